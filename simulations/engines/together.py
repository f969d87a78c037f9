"""Selects the turns of a round that train at once; connects the in-process grid (messages) with `batched.py` (tensors)."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from flwr.app import Context, Message

from fedtune.clients.app import PreparedTurn, client_of, evaluate_together, finish, prepare, take_turn
from fedtune.clients.declining import decline_reply
from fedtune.clients.host import ClientHost
from fedtune.clients.loaded_model import LoadedModel
from fedtune.errors import FedtuneError
from fedtune.models import LiveAdapter
from fedtune.models.memory import is_out_of_memory
from fedtune.simulations.engines.batched import Result, TurnInput, train_together, way_of
from fedtune.simulations.engines.client_batch import Way
from fedtune.simulations.engines.width import WIDEST, allowed, pays
from fedtune.storage.atomic import write_text
from fedtune.storage.parsing import parse_json, read_text

log = logging.getLogger("fedtune.batched")


class Together:
    """Answers messages in batches of clients.

    Args:
        host: The clients' host.
        batched: `auto` or a number of clients.
    """

    def __init__(self, host: ClientHost, batched: str) -> None:
        self._host = host
        self._widest = WIDEST if batched == "auto" else int(batched)
        self._auto = batched == "auto"
        self._ways: dict[int, Way | None] = {}
        self._widths: dict[tuple[object, ...], int] = {}
        self._told: set[str] = set()
        self._way_of(host.space.own)

    def _way_of(self, model: LoadedModel) -> Way | None:
        """The way to batch clients of this loaded model; None if impossible, which is logged once."""
        if id(model) not in self._ways:
            if self._host.config.privacy.kind == "record":
                way, why = None, "privacy=record clips the gradient of each row"
            else:
                way, why = way_of(model.live, self._host.config.task)
            if way is None:
                self._report(f"clients train one at a time: {why}")
            elif why:
                log.info("clients are batched by torch.func.vmap: %s", why)
            self._ways[id(model)] = way
        return self._ways[id(model)]

    def __call__(self, waiting: Iterator[tuple[Message, Context]]) -> list[Message]:
        first = next(waiting)
        if first[0].metadata.message_type == "evaluate":
            return self._score([first, *itertools.islice(waiting, WIDEST - 1)])
        return self._turns(itertools.chain([first], waiting))

    def _score(self, asked: list[tuple[Message, Context]]) -> list[Message]:
        """Evaluate all clients that evaluate the same adapter as the first, in shared batches."""
        same = [a for a in asked if _is_same(asked[0][0], a[0]) and self._precision(a) == self._precision(asked[0])]
        try:
            return evaluate_together(self._host, same)
        except Exception as bad:  # as in the ClientApp: report the error, continue the round
            if len(same) == 1:
                return [decline_reply(same[0][0], bad)]
        return [reply for one in same for reply in self._score([one])]  # one client's error must not affect the others

    def _precision(self, asked: tuple[Message, Context]) -> str:
        """The client's precision; the same for all without device classes."""
        if not self._host.config.devices.classes:
            return self._host.config.model.precision
        return self._host.devices.fixed_choice(client_of(self._host, asked[1])).precision

    def _turns(self, waiting: Iterator[tuple[Message, Context]]) -> list[Message]:
        replies, todo = [], list[PreparedTurn]()
        for message, context in itertools.islice(waiting, self._widest):
            try:
                ready = prepare(self._host, message, context)
            except Exception as bad:  # as in the ClientApp: report the error, continue the round
                replies.append(decline_reply(message, bad))
                continue
            alone = ready.turn.batched is None or ready.plan.keep_optimizer
            if ready.turn.batched is None:
                self._report(f"clients run the turn '{ready.plan.turn}' one at a time: it has no batched form")
            elif alone:
                self._report("clients train one at a time: they continue their own optimizer's state")
            if not todo and (alone or self._way_of(ready.loaded_model) is None):
                return [*replies, self._one(ready)]
            if not todo or _kind(ready) == _kind(todo[0]):
                todo.append(ready)
            if len(todo) >= self._widths.get(_kind(todo[0]), self._widest):
                break
        if not todo:
            return replies
        kind = _kind(todo[0])
        if self._auto and kind not in self._widths and len(todo) > 1:
            self._widths[kind] = self._choose(todo)
            log.info("%d clients train at once", self._widths[kind])
        todo = todo[: self._widths.get(kind, self._widest)]
        return replies + (self._train(todo) if len(todo) > 1 else [self._one(todo[0])])  # a batch of one is no faster than the trainer

    def _one(self, ready: PreparedTurn) -> Message:
        try:
            return take_turn(self._host, ready)
        except Exception as bad:
            return decline_reply(ready.message, bad)

    def _report(self, sentence: str) -> None:
        """Log a sentence once: it holds in every round."""
        if sentence not in self._told:
            self._told.add(sentence)
            log.warning(sentence)

    def _train(self, todo: list[PreparedTurn]) -> list[Message]:
        try:
            results = self._together(todo)
        except Exception as bad:
            results, too_large = None, is_out_of_memory(bad) and len(todo) > 1
            if not too_large:
                self._report(f"clients could not train at once and did so one at a time ({type(bad).__name__}: {str(bad)[:200]})")
        # outside of the except clause, whose traceback holds the attempt's tensors
        if results is not None:
            return [self._finish(t, r) for t, r in zip(todo, results, strict=True)]
        if not too_large:
            return [self._one(t) for t in todo]
        half = len(todo) // 2
        kind = _kind(todo[0])
        self._widths[kind] = min(self._widths.get(kind, self._widest), half)
        log.warning("%d clients at once exceed the memory: %d from now on", len(todo), self._widths[kind])
        return self._train(todo[:half]) + self._train(todo[half:])

    def _finish(self, ready: PreparedTurn, result: Result) -> Message:
        if isinstance(result, FedtuneError):
            return decline_reply(ready.message, result)
        try:
            return finish(self._host, ready, *result)
        except Exception as bad:  # for example, the disk is full when the client stores its tensors
            return decline_reply(ready.message, bad)

    def _together(self, todo: list[PreparedTurn]) -> list[Result]:
        way = self._way_of(todo[0].loaded_model)
        assert way is not None
        return train_together(self._live(todo[0]), _turn_inputs(todo), self._host.config.task, pad_id=self._host.space.pad_id, way=way)

    def _live(self, first: PreparedTurn) -> LiveAdapter:
        live = first.loaded_model.slot(first.start)
        assert isinstance(live, LiveAdapter)  # in the phase `peft`
        return live

    # -- how many -------------------------------------------------------------------------------------------------------------------------

    def _choose(self, todo: list[PreparedTurn]) -> int:
        """Return the number that tokens and memory allow, if it is measured to be faster than one at a time; else 1.

        The result is stored for this machine, so that the same config gives the same bits next time.
        """
        model, way, turn_inputs = todo[0].loaded_model, self._way_of(todo[0].loaded_model), _turn_inputs(todo)
        assert way is not None
        space, config, live = self._host.space, model.config, self._live(todo[0])
        width = allowed(live, turn_inputs, config.task)
        if width < 2:
            return 1
        plan, threads = todo[0].plan, torch.get_num_threads()
        what = json.dumps([dataclasses.asdict(c) for c in (config.model, config.peft, config.task)], sort_keys=True)
        marks = model.backbone.fingerprint[:16], hashlib.sha256(what.encode()).hexdigest()[:16]
        key = f"{' '.join(marks)} {plan.batch_size}x{plan.accumulate} {width} clients {threads} threads"
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtune" / "batched.json"
        known = _read(path)
        if key not in known:
            try:
                faster = pays(live, turn_inputs[:width], config.task, pad_id=space.pad_id, way=way)
                known[key] = width if faster else 1
            except Exception as bad:  # for example, a client's loss overflows: its own turn reports it
                self._report(f"clients train one at a time: training at once could not be measured ({type(bad).__name__}: {bad})")
                return 1
            _write(path, known)
        return known[key]


def _is_same(a: Message, b: Message) -> bool:
    """Whether two messages share the same adapter bytes, which the bridge encodes once for all clients that need them."""
    mine, theirs = (m.content.array_records["adapter"] for m in (a, b))
    frames = [m.content.config_records["frame"]["json"] for m in (a, b)]
    return frames[0] == frames[1] and mine.keys() == theirs.keys() and all(mine[n].data is theirs[n].data for n in mine)


def _turn_inputs(todo: Sequence[PreparedTurn]) -> list[TurnInput]:
    return [TurnInput(plan=t.plan, start=t.start, examples=t.examples, extra=t.extra) for t in todo]


def _kind(ready: PreparedTurn) -> tuple[object, ...]:
    """The properties that turns must share to train at once."""
    plan = ready.plan
    return id(ready.loaded_model), plan.turn, plan.train, plan.optimizer, plan.batch_size, plan.accumulate, plan.measure


def _read(path: Path) -> dict[str, int]:
    try:
        found = parse_json(read_text(path))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(path: Path, known: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(known), durable=False, shared=True)
    except OSError as bad:
        log.warning("cannot write the measured client batch to %s (%s): it will be measured again", path, bad.strerror)

"""Which of a round's turns train at once: between the in-process grid, which has messages, and `batched.py`, which has tensors."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message

from fedtune.clients.app import Prepared, finish, prepare, score_together
from fedtune.clients.declining import declined, is_out_of_memory
from fedtune.clients.trainer import train
from fedtune.clients.workspace import Workspace
from fedtune.errors import FedtuneError
from fedtune.simulations.batched import Job, train_together, why_not

log = logging.getLogger("fedtune.batched")
_WIDEST = 32  # clients
_TOKENS = 1024  # of one flat batch: where bench_batched found the best ratio on two cores, for models of 1 to 20 M parameters
_BYTES = 1 << 29  # of one flat batch's logits with their gradients


class Together:
    """Answers messages in batches of clients.

    Args:
        space: The process's workspace.
        batched: `auto` or a number of clients.
    """

    def __init__(self, space: Workspace, batched: str) -> None:
        self._space = space
        self._width = _WIDEST if batched == "auto" else int(batched)
        self._undecided = batched == "auto"
        if reason := why_not(space.live):
            log.warning("clients train one after the other: %s", reason)
            self._width, self._undecided = 1, False

    def __call__(self, waiting: Iterator[tuple[Message, Context]]) -> list[Message]:
        first = next(waiting)
        if first[0].metadata.message_type == "evaluate":
            return self._score([first, *itertools.islice(waiting, _WIDEST - 1)])
        return self._turns(itertools.chain([first], waiting))

    def _score(self, asked: list[tuple[Message, Context]]) -> list[Message]:
        """Evaluate the clients that are to evaluate the same adapter as the first, in the same batches."""
        wanted = asked[0][0].content.array_records["adapter"]
        same = [a for a in asked if _is_same(wanted, a[0].content.array_records["adapter"])]
        try:
            return score_together(self._space, same)
        except Exception as bad:  # as in the ClientApp: the cause goes back, the round goes on
            return [declined(message, bad) for message, _ in same]

    def _turns(self, waiting: Iterator[tuple[Message, Context]]) -> list[Message]:
        replies, todo = [], list[Prepared]()
        for message, context in itertools.islice(waiting, self._width):
            try:
                ready = prepare(self._space, message, context)
            except Exception as bad:  # as in the ClientApp: the cause goes back, the round goes on
                replies.append(declined(message, bad))
                continue
            if not todo or _kind(ready) == _kind(todo[0]):
                todo.append(ready)
        if not todo:
            return replies
        if self._undecided:
            self._width, self._undecided = self._choose(todo), False
            log.info("%d clients train at once", self._width)
        return replies + self._train(todo[: self._width])

    def _train(self, todo: list[Prepared]) -> list[Message]:
        try:
            results = train_together(self._space.live, _jobs(todo), self._space.config.task, pad_id=self._space.pad_id)
        except Exception as bad:
            if not is_out_of_memory(bad) or len(todo) == 1:
                return [declined(t.message, bad) for t in todo]
            half = len(todo) // 2
            self._width = min(self._width, half)
            log.warning("%d clients at once were too many for the memory: %d from now on", len(todo), self._width)
            return self._train(todo[:half]) + self._train(todo[half:])
        return [
            declined(t.message, r) if isinstance(r, FedtuneError) else finish(self._space, t, *r)
            for t, r in zip(todo, results, strict=True)
        ]

    # -- how many -------------------------------------------------------------------------------------------------------------------------

    def _choose(self, todo: list[Prepared]) -> int:
        """The number that tokens and memory allow, if a short measurement finds it faster than one after the other; 1 if not.

        What was measured is kept for this machine, so that the same config gives the same bits the next time.
        """
        width = _allowed(self._space, todo)
        if min(width, len(todo)) < 2:
            return 1
        plan, threads = todo[0].plan, torch.get_num_threads()
        config = self._space.config
        what = json.dumps([dataclasses.asdict(c) for c in (config.model, config.peft, config.task)], sort_keys=True)
        marks = self._space.backbone.fingerprint[:16], hashlib.sha256(what.encode()).hexdigest()[:16]
        key = f"{' '.join(marks)} {plan.batch_size}x{plan.accumulate} {width} clients {threads} threads"
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedtune" / "batched.json"
        known = _read(path)
        if key not in known:
            known[key] = width if self._pays(todo[:width]) else 1
            _write(path, known)
        return known[key]

    def _pays(self, todo: list[Prepared]) -> bool:
        """Whether two steps of all together beat two steps of each on its own; trained tensors are thrown away."""
        space, ratios = self._space, []
        few = todo[:4]
        for repeat in range(4):
            start = time.perf_counter()
            for t in few:
                space.live.load(t.start)
                train(space.live, t.examples, t.plan, space.config.task, pad_id=space.pad_id, max_steps=2)
            alone = (time.perf_counter() - start) / len(few)
            start = time.perf_counter()
            train_together(space.live, [dataclasses.replace(j, max_steps=2) for j in _jobs(todo)], space.config.task, pad_id=space.pad_id)
            if repeat:  # the first warms up
                ratios.append(alone * len(todo) / (time.perf_counter() - start))
        return statistics.median(ratios) > 1.1


def _is_same(a: ArrayRecord, b: ArrayRecord) -> bool:
    """Whether two messages carry the very same bytes, which the bridge encodes once."""
    return a.keys() == b.keys() and all(a[n].data is b[n].data for n in a)


def _jobs(todo: Sequence[Prepared]) -> list[Job]:
    return [Job(plan=t.plan, start=t.start, examples=t.examples, max_steps=t.max_steps) for t in todo]


def _kind(ready: Prepared) -> tuple[object, ...]:
    """What turns must have in common to train at once."""
    return ready.plan.batch_size, ready.plan.accumulate, ready.plan.train


def _allowed(space: Workspace, todo: Sequence[Prepared]) -> int:
    lengths = [len(e.input_ids) for t in todo for e in t.examples]
    tokens = max(1, round(todo[0].plan.batch_size * statistics.mean(lengths)))
    words = 1 if space.config.task.kind == "classification" else int(space.backbone.model.config.vocab_size)
    return min(_WIDEST, max(1, _TOKENS // tokens), max(1, _BYTES // (tokens * words * 4 * 3)))


def _read(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(path: Path, known: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(known))
        os.replace(beside, path)
    except OSError as bad:
        log.warning("cannot keep the measured batch of clients in %s (%s): it will be measured again", path, bad.strerror)

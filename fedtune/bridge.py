"""The one bridge that puts any Strategy on Flower's grid.

It samples, sends, waits, checks every reply before it counts, names whoever is dropped, checkpoints after every round, and starts at any
round. Replies are pulled and folded in the order of logical ids, one at a time: the server's memory is that of one model, and the sum has
one order.
"""

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune import flower
from fedtune.config import Config
from fedtune.errors import UpdateError
from fedtune.late import Awaited, Late, Latecomers, caught_up, difference
from fedtune.plan import Plan, Update
from fedtune.planning import base_plan
from fedtune.post import Letter, check_affordable, excess, most_bytes, write_letters
from fedtune.reply import OURS, read_metrics, read_update
from fedtune.roll import FEW_BYTES, Client, Roll, Welcome, plain, push, replies
from fedtune.run import Checkpoint, RunDirectory
from fedtune.seeds import derive_seed
from fedtune.silence import forget, miss, resting
from fedtune.snapshot import Snapshots
from fedtune.state import AdapterState
from fedtune.strategy import Assignment, ServerState, Strategy
from fedtune.turnout import Turnout, epsilon_of, refusal
from fedtune.weights import heaviest, share_of
from fedtune.wire import OFFER, Envelopes

_PLANNED = 64  # clients of an evaluation that are planned at once: an assignment may hold as much as a model


class Watcher(Protocol):
    """Who is told how the run goes: the terminal, the metrics file, the report."""

    def client_known(self, client: str, node: int, device_class: str) -> None: ...
    def round_started(self, round: int, rounds: int, cohort: Sequence[str]) -> None: ...
    def client_done(self, client: str, dropped: str | None) -> None: ...
    def round_done(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """One experiment on one grid.

    Args:
        grid: Flower's grid, or any other of its shape.
        strategy: How updates become a state.
        config: The experiment.
        run: Where it is kept.
        initial: The adapter before the first round.
        found: The checkpoint to go on from; None starts.
        metric: Name of the primary metric, and whether more is better.
        evaluate: Global test of a state; None where nobody can.
        watcher: Who is told.
        welcome: How clients are let in.
        snapshots: The sums of what has been merged into the frozen weights.
    """

    grid: Grid
    strategy: Strategy
    config: Config
    run: RunDirectory
    initial: AdapterState
    found: Checkpoint | None
    metric: tuple[str, bool]
    evaluate: Callable[[ServerState], Mapping[str, float]] | None
    watcher: Watcher
    welcome: Welcome = Welcome()
    snapshots: Snapshots = field(default_factory=Snapshots)

    def loop(self) -> ServerState:
        """Run all rounds that are left, and return the last state."""
        found = self.found
        done = found.round if found else 0
        weights = self.config.weights
        roll = Roll(self.grid, self.initial.spec.base, self.config.min_clients, self.welcome, self.watcher, weights.max_examples)
        if share := share_of(weights, self.config.clients_per_round, engine=self.welcome.wanted is None):
            self.watcher.note(
                f"a client counts at most {float(share):.3g} of a round of {self.config.clients_per_round} (weights.max_share), and may say"
                f" that it has {weights.max_examples} examples (weights.max_examples)"
            )
        clients = roll.gather(done + 1)
        if found is None:
            found = Checkpoint(round=0, state=self.strategy.start(self.initial), clients={})
            record, records = {"round": 0, "client": None}, {c: {"round": 0, "client": c} for c in clients}
            self.watcher.round_started(0, self.config.rounds, ())
            self._score(found.state, roll.here(), record, records)
            self._close(found, record, records)
        state, book = found.state, {c: dict(v) for c, v in found.clients.items()}
        late = Latecomers(self.config, found.late)
        if self.config.traffic.max_mb_per_round is not None and found.round < self.config.rounds:
            check_affordable(self._letters(found.round + 1, sorted(clients), clients, state))
        for round in range(found.round + 1, self.config.rounds + 1):
            started = time.perf_counter()
            here, busy = roll.present(round), late.busy(round)
            busy |= resting(self.grid, {c: clients[c] for c in here if c not in busy}, round, self.watcher.note)
            cohort = self._sample(self._free(here, busy), round)
            self.watcher.round_started(round, self.config.rounds, cohort)
            before = state
            state, turnout = self._train(round, cohort, clients, state, late)
            for note in self.strategy.notes(round, before, state) if state is not before else []:
                self.watcher.note(note)
            record = turnout.summary(round, len(cohort), may_be_late=self.config.late == "use")
            if round % self.config.eval.every == 0 or round == self.config.rounds:
                self._score(state, roll.here(), record, turnout.records)
            record["seconds"] = time.perf_counter() - started
            for client in cohort:
                entry = book.setdefault(client, {"counted": 0, "dropped": 0, "last": None})
                why = turnout.records[client].get("dropped")
                entry["dropped" if why else "counted"] += 1
                entry["last"] = why or f"counted in round {round}"
            for client, rounds in turnout.late.items():
                book[client]["counted"] += 1
                book[client]["last"] = f"counted in round {round}, {rounds} late"
            for client in (*cohort, *turnout.late):
                if "epsilon" in turnout.records[client]:
                    book[client]["epsilon"] = turnout.records[client]["epsilon"]
            if spent := [entry["epsilon"] for entry in book.values() if "epsilon" in entry]:
                record["epsilon"] = max(spent)  # of the client that has spent most
            record.update(self.strategy.figures(round, before, state, sorted(book)))
            self._close(Checkpoint(round=round, state=state, clients=book, late=late.kept), record, turnout.records)
        return state

    # -- one round ------------------------------------------------------------------------------------------------------------------------

    def _sample(self, here: Iterable[str], round: int) -> list[str]:
        ids = sorted(here)
        chosen = random.Random(derive_seed(self.config.seed, "cohort", round)).sample(ids, min(self.config.clients_per_round, len(ids)))
        return sorted(chosen)

    def _free(self, here: Sequence[str], busy: set[str]) -> Sequence[str]:
        """Who is not at an older turn, nor sits out for one; everybody where these are too few."""
        free = [c for c in here if c not in busy]
        return free if len(free) >= self.config.min_clients else here

    def _train(
        self, round: int, cohort: Sequence[str], clients: Mapping[str, Client], state: ServerState, late: Latecomers
    ) -> tuple[ServerState, Turnout]:
        turnout = Turnout()
        for client, why in self.strategy.left_out(round, cohort).items():
            turnout.records[client] = {"round": round, "client": client}
            turnout.drop(client, "privacy", why)
            self.watcher.client_done(client, f"privacy: {why}")
        cohort = [c for c in cohort if c not in turnout.records]
        letters = self._letters(round, cohort, clients, state)
        for client, letter in letters.items():
            turnout.records[client] = {"round": round, "client": client, "bytes_down": 0 if letter.too_much else letter.nbytes}
            if letter.too_much:
                turnout.drop(client, "traffic", letter.too_much)
                self.watcher.client_done(client, f"traffic: {letter.too_much}")
        until = self._until()
        contents = self._accepted(round, {c: letters[c] for c in letters if not letters[c].too_much}, clients, turnout, state, until)
        turnout.heaviest = self._heaviest(round, contents, clients)
        replies = self._ask(
            "train",
            round,
            contents,
            clients,
            turnout,
            state,
            until,
            lambda c, i: late.expect(_awaited(letters[c], i, clients[c])),
            most=lambda c: most_bytes(letters[c].assignment),
        )
        checked = self._checked(replies, {c: letter.assignment for c, letter in letters.items()}, clients, turnout, late)
        updates = map(turnout.weigh, itertools.chain(checked, self._belated(round, state, clients, turnout, late)))
        first = next(updates, None)
        if first is None:
            self.watcher.note(f"round {round} does not count: no client sent a good update; the state stays as it was")
            return state, turnout
        after = self.strategy.aggregate(round, state, itertools.chain([first], updates))
        if turnout.good < self.config.min_clients:
            short = f"{turnout.good} good updates of min_clients={self.config.min_clients}"
            self.watcher.note(f"round {round} does not count: {short}; the state stays as it was")
            return state, turnout
        if broken := _not_finite(after):
            self.watcher.note(f"round {round} does not count: '{broken}' of its result is not finite; the state stays as it was")
            return state, turnout
        return dataclasses.replace(after, adapter=after.adapter.replace(version=round)), turnout

    def _accepted(
        self, round: int, letters: Mapping[str, Letter], clients: Mapping[str, Client], turnout: Turnout, state: ServerState, until: float
    ) -> dict[str, RecordDict]:
        """What is sent: to a client that lacks shifts only once it has said that a message of that size fits it."""
        offers = {c: letter.offer for c, letter in letters.items() if letter.offer is not None}
        for client in offers:
            turnout.records[client]["bytes_down"] = flower.Meter()(offers[client])
        accepted = [c for c, _ in self._ask(OFFER, round, offers, clients, turnout, state, until)] if offers else []
        for client in accepted:
            turnout.records[client]["bytes_down"] = letters[client].nbytes
        return {c: letter.content for c, letter in letters.items() if c in accepted or c not in offers}

    def _heaviest(self, round: int, cohort: Collection[str], clients: Mapping[str, Client]) -> int | None:
        share = share_of(self.config.weights, len(cohort), engine=self.welcome.wanted is None)
        if share is None or not (most := heaviest((clients[c].examples for c in cohort), share)):
            return None
        for client in (c for c in cohort if clients[c].examples > most):
            self.watcher.note(f"round {round}: client {client} counts {most} of its {clients[client].examples} examples: weights.max_share")
        return most

    def _letters(self, round: int, ids: Sequence[str], clients: Mapping[str, Client], state: ServerState) -> dict[str, Letter]:
        assignments = self.strategy.plan(round, self._plans(round, ids, clients, state), state)
        snapshot = self.snapshots.of(state.shifts)
        return write_letters(self.config, round, assignments, {c: clients[c].held for c in ids}, state.shifts, self.initial, snapshot)

    def _plans(self, round: int, ids: Sequence[str], clients: Mapping[str, Client], state: ServerState) -> list[Plan]:
        return [base_plan(self.config, round, c, state.adapter.spec.version, clients[c].rank) for c in ids]

    def _checked(
        self,
        replies: Iterator[tuple[str, Message]],
        assignments: Mapping[str, Assignment],
        clients: Mapping[str, Client],
        turnout: Turnout,
        late: Latecomers,
    ) -> Iterator[Update]:
        """The good updates, in order; the others are named in the turnout."""
        deadline = self.config.devices.deadline_s
        for client, reply in replies:
            record = turnout.records[client]
            try:
                update = self._read(reply, assignments[client], clients[client].examples, record["bytes_down"], record)
            except UpdateError as bad:
                turnout.drop(client, "refused", plain(bad))
                self.watcher.client_done(client, record["dropped"])
                continue
            took = update.measurements.get("virtual_s", 0.0)
            if deadline is not None and took > deadline:
                turnout.drop(client, "late", f"{took:.1f} s of {deadline:g} s")
                late.keep(update, assignments[client], took)
                self.watcher.client_done(client, record["dropped"])
                continue
            self.watcher.client_done(client, None)
            yield update

    def _read(self, reply: Message, assignment: Assignment, examples: int, bytes_down: int, record: dict[str, Any]) -> Update:
        """A reply, checked, with what it says in the client's line. Raises UpdateError."""
        up = flower.Meter()(reply.content)
        record["bytes_up"] = record.get("bytes_up", 0) + up
        if too_much := excess(self.config.traffic.max_mb_per_round, bytes_down, up):
            raise UpdateError(too_much)
        update = read_update(reply.content, assignment, examples=examples)
        told = {**update.measurements, **update.metrics, "device_class": update.device_class, "examples": update.examples}
        record.update({name: value for name, value in told.items() if name not in OURS})
        if update.precision:
            record["precision"] = update.precision
        return update

    def _belated(
        self, round: int, state: ServerState, clients: Mapping[str, Client], turnout: Turnout, late: Latecomers
    ) -> Iterator[Update]:
        """Replies to earlier rounds that are there now, moved onto the state of today: of each client one, and none beside a newer one."""
        newer = {c for c, record in turnout.records.items() if "dropped" not in record}
        for one in itertools.chain(late.take(round), self._arrived(round, newer, clients, turnout, late)):
            client, asked = one.update.client, one.update.round
            if client in newer:
                self._leave_out(round, client, asked, "left out: a newer one of it counts", turnout)
                continue
            newer.add(client)
            record = turnout.records.setdefault(client, {"round": round, "client": client})
            turnout.late[client] = record["staleness"] = round - asked
            yield caught_up(one, state.adapter, round - asked)

    def _arrived(
        self, round: int, newer: Collection[str], clients: Mapping[str, Client], turnout: Turnout, late: Latecomers
    ) -> Iterator[Late]:
        """Good replies to messages of earlier rounds that have come by now; nobody waits for them."""
        for awaited in late.awaited():
            plan = awaited.assignment.plan
            if plan.round == round or (reply := next(replies(self.grid, [awaited.message], 0.0))) is None:
                continue
            late.came(awaited)
            if plan.client in clients:
                forget(clients[plan.client])
            if reply.has_error() or "declined" in reply.content.config_records:
                continue  # it was named as late in its own round
            if plan.client in newer:
                self._leave_out(round, plan.client, plan.round, "left out: a newer one of it counts", turnout)
                continue
            record = turnout.records.setdefault(plan.client, {"round": round, "client": plan.client})
            try:
                update = self._read(reply, awaited.assignment, awaited.examples, awaited.nbytes, record)
            except UpdateError as bad:
                self._leave_out(round, plan.client, plan.round, f"refused: {plain(bad)}", turnout)
                continue
            yield Late(update=difference(update, awaited.assignment.adapter), due=round)

    def _leave_out(self, round: int, client: str, asked: int, why: str, turnout: Turnout) -> None:
        record = turnout.records.setdefault(client, {"round": round, "client": client})
        record["late"] = f"its reply to round {asked} is {why}"
        self.watcher.note(f"client {client}: {record['late']}")

    def _ask(
        self,
        kind: str,
        round: int,
        contents: Mapping[str, RecordDict],
        clients: Mapping[str, Client],
        turnout: Turnout,
        state: ServerState,
        until: float,
        unanswered: Callable[[str, str], None] = lambda client, message: None,
        most: Callable[[str], int] = lambda client: FEW_BYTES,
    ) -> Iterator[tuple[str, Message]]:
        """Send each client its content; yield the replies that came, in the order of logical ids; name the clients whose reply did not.

        `unanswered` is told of a client whose reply may still come, and of the message's id; `most` says how many bytes a client's reply
        may take.
        """
        messages = {c: Message(contents[c], clients[c].node, kind, group_id=str(round)) for c in sorted(contents)}
        asked = list(messages)
        ids = push(self.grid, list(messages.values()), lambda i: most(asked[i]))
        for client, i, reply in zip(messages, ids, replies(self.grid, ids, until), strict=True):
            if reply is None:
                why = ("late", f"no reply within {self.config.round_timeout_s:g} s")
                if i:  # it was sent
                    unanswered(client, i)
                    miss(client, clients[client], round, i, self.watcher.note)
            else:
                if kind == "train":
                    forget(clients[client])
                why = refusal(reply)
                if why is None:
                    if clients[client].remembers and kind != OFFER:
                        clients[client].held = tuple(s.spec.version for s in state.shifts)
                    yield client, reply
                    continue
                if why[0] == "failed":
                    clients[client].held = ()  # a device that broke may have started anew: then it has nothing any more
            record = turnout.records.setdefault(client, {"round": round, "client": client})
            if reply is not None and (spent := epsilon_of(reply)) is not None:
                record["epsilon"] = spent
            turnout.drop(client, *why)
            self.watcher.client_done(client, ": ".join(why))

    def _until(self) -> float:
        """When the replies to what is sent now must be there, by `time.monotonic`."""
        limit = self.config.round_timeout_s
        return math.inf if limit is None else time.monotonic() + limit

    # -- around the rounds ----------------------------------------------------------------------------------------------------------------

    def _score(self, state: ServerState, clients: Mapping[str, Client], record: dict[str, Any], records: dict[str, dict[str, Any]]) -> None:
        """Add the global metrics, and those of the clients on their own held-out rows."""
        if self.evaluate is not None:
            record.update(self.evaluate(state))
        asked = sorted(c for c in clients if not clients[c].owes)
        if 0 <= self.config.eval.clients < len(asked):
            asked = sorted(random.Random(derive_seed(self.config.seed, "eval")).sample(asked, self.config.eval.clients))
        # a client's own tensors are those that it would go on with in the next round
        round = record["round"]
        envelopes, contents = Envelopes(round, state.shifts, snapshot=self.snapshots.of(state.shifts)), {}
        for i in range(0, len(asked), _PLANNED):
            some = asked[i : i + _PLANNED]
            coming = self.strategy.plan(round + 1, self._plans(round + 1, some, clients, state), state)
            contents |= {c: envelopes.write(state.adapter, held=clients[c].held, coming=coming[c].plan) for c in some}
        # an evaluation is not the method's traffic, but shifts that it brings need not be sent again
        meter = flower.Meter()
        record["bytes_down"] = record.get("bytes_down", 0) + sum(meter(_shifts_of(content)) for content in contents.values())
        turnout = Turnout(records={c: {} for c in asked})
        values = []
        for client, reply in self._ask("evaluate", round, contents, clients, turnout, state, self._until()):
            metrics = read_metrics(reply.content)
            records.setdefault(client, {"round": round, "client": client}).update(metrics)
            if self.metric[0] in metrics:
                values.append(metrics[self.metric[0]])
        if values:
            worst = sorted(values, reverse=not self.metric[1])[: math.ceil(len(values) / 10)]
            record["clients_mean"] = sum(values) / len(values)
            record["clients_worst_decile"] = sum(worst) / len(worst)

    def _close(self, checkpoint: Checkpoint, record: dict[str, Any], clients: dict[str, dict[str, Any]]) -> None:
        """Metrics first: a kill between the two leaves lines of a round that the resume will drop and write again."""
        self.watcher.round_done(record, [clients[c] for c in sorted(clients)])
        self.run.save(checkpoint)


def _awaited(letter: Letter, message: str, client: Client) -> Awaited:
    return Awaited(message=message, assignment=letter.assignment, examples=client.examples, nbytes=letter.nbytes)


def _not_finite(state: ServerState) -> str:
    """The first tensor that finite updates have overflowed, such as the square of one that a client made huge; "" where there is none."""
    groups = (state.adapter.tensors, state.memory, *(s.tensors for s in state.shifts[-1:]))
    found = (n for tensors in groups for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all())
    return next(found, "")


def _shifts_of(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if name.startswith(("shift-", "snapshot"))})  # type: ignore[arg-type]


__all__ = ["Bridge", "Watcher"]

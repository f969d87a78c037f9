"""The one bridge that puts any Strategy on Flower's grid: it samples cohorts, runs rounds, has clients evaluate, and checkpoints.

It starts at any round. What happens in one round is in round.py.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune.config import Config
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.scores import worst_decile
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.contracts.wire import Envelopes
from fedtune.exchange import Exchange, NoUpdates
from fedtune.rounds.courier import Courier, Watcher
from fedtune.rounds.membership import Client, Roll, Welcome
from fedtune.rounds.outbox import Letter, check_affordable, write_letters
from fedtune.rounds.planning import base_plan
from fedtune.rounds.reply import read_metrics
from fedtune.rounds.round import Round
from fedtune.rounds.silence import resting
from fedtune.rounds.snapshot import Snapshots
from fedtune.rounds.staleness import Latecomers
from fedtune.rounds.turnout import Turnout
from fedtune.rounds.weights import share_of
from fedtune.runs.directory import Checkpoint, RunDirectory

_PLANNED = 64  # clients of an evaluation that are planned at once: an assignment may hold as much as a model


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """One experiment on one grid.

    Args:
        grid: Flower's grid, or any other of its shape.
        strategy: How updates become a state.
        exchange: Which messages make up a round, and what the strategy gets to see.
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
    exchange: Exchange
    config: Config
    run: RunDirectory
    initial: AdapterState
    found: Checkpoint | None
    metric: tuple[str, bool]
    evaluate: Callable[[ServerState], Mapping[str, float]] | None
    watcher: Watcher
    welcome: Welcome = Welcome()
    snapshots: Snapshots = field(default_factory=Snapshots)

    @property
    def courier(self) -> Courier:
        return Courier(grid=self.grid, timeout_s=self.config.round_timeout_s, watcher=self.watcher)

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
            started = dataclasses.replace(self.strategy.start(self.initial), exchange=self.exchange.start())
            found = Checkpoint(round=0, state=started, clients={})
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
            record.update(self.exchange.figures(round, before, state))
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
        one = Round(round, self.config, self.courier, clients, state, late, self.welcome.wanted is not None)
        asked = one.leave_out(self.exchange, cohort)
        one.address(self._letters(round, asked, clients, state))

        def does_not_count(why: str) -> tuple[ServerState, Turnout]:
            self.watcher.note(f"round {round} does not count: {why}; the state stays as it was")
            return state, one.turnout

        try:
            after = self.exchange.run(round, state, self.strategy, one)
        except NoUpdates:
            return does_not_count("no client sent a good update")
        if one.turnout.good < self.config.min_clients:
            return does_not_count(f"{one.turnout.good} good updates of min_clients={self.config.min_clients}")
        if broken := _not_finite(after):
            return does_not_count(f"'{broken}' of its result is not finite")
        return dataclasses.replace(after, adapter=after.adapter.replace(version=round)), one.turnout

    def _letters(self, round: int, ids: Sequence[str], clients: Mapping[str, Client], state: ServerState) -> dict[str, Letter]:
        assignments = self.strategy.plan(round, self._plans(round, ids, clients, state), state)
        snapshot = self.snapshots.of(state.shifts)
        return write_letters(self.config, round, assignments, {c: clients[c].held for c in ids}, state.shifts, self.initial, snapshot)

    def _plans(self, round: int, ids: Sequence[str], clients: Mapping[str, Client], state: ServerState) -> list[Plan]:
        return [base_plan(self.config, round, c, state.adapter.spec.version, clients[c].rank) for c in ids]

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
        versions = tuple(s.spec.version for s in state.shifts)
        for client, reply in self.courier.ask("evaluate", round, contents, clients, turnout, versions, self.courier.until()):
            metrics = read_metrics(reply.content)
            records.setdefault(client, {"round": round, "client": client}).update(metrics)
            if self.metric[0] in metrics:
                values.append(metrics[self.metric[0]])
        if values:
            record["clients_mean"] = sum(values) / len(values)
            record["clients_worst_decile"] = worst_decile(values, higher_is_better=self.metric[1])

    def _close(self, checkpoint: Checkpoint, record: dict[str, Any], clients: dict[str, dict[str, Any]]) -> None:
        """Metrics first: a kill between the two leaves lines of a round that the resume will drop and write again."""
        self.watcher.round_done(record, [clients[c] for c in sorted(clients)])
        self.run.save(checkpoint)


def _not_finite(state: ServerState) -> str:
    """The first tensor that finite updates have overflowed, such as the square of one that a client made huge; "" where there is none."""
    groups = (state.adapter.tensors, state.memory, state.exchange, *(s.tensors for s in state.shifts[-1:]))
    found = (n for tensors in groups for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all())
    return next(found, "")


def _shifts_of(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if name.startswith(("shift-", "snapshot"))})  # type: ignore[arg-type]


__all__ = ["Bridge", "Watcher"]

"""The bridge runs any Strategy on Flower's grid: it samples cohorts, runs rounds, requests clients' evaluations, and saves checkpoints.

It can start at any round. round.py implements one round.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune.config import Config
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.scores import SHARED, personal_gain, worst_decile
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.contracts.task import task_of
from fedtune.contracts.warm_start import WarmStart
from fedtune.contracts.wire import MessageWriter
from fedtune.exchange import Exchange, NoUpdates
from fedtune.rounds.delivery import Delivery, Offer
from fedtune.rounds.membership import Client, JoinPolicy, Membership
from fedtune.rounds.messenger import Messenger, Observer
from fedtune.rounds.outbox import OutboundMessage, check_affordable, write_messages
from fedtune.rounds.outcome import RoundOutcome
from fedtune.rounds.planning import base_plan
from fedtune.rounds.reply import read_metrics
from fedtune.rounds.round import Round
from fedtune.rounds.silence import paused_clients
from fedtune.rounds.snapshot import Snapshots
from fedtune.rounds.staleness import LateUpdates
from fedtune.rounds.weights import largest_share
from fedtune.runs.directory import Checkpoint, RunDirectory

_PLAN_BATCH = 64  # clients whose evaluation is planned at once, because each assignment may be as large as a model


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """One experiment on one grid.

    Args:
        grid: Flower's grid, or another with its interface.
        strategy: Aggregates updates into the next state.
        exchange: Defines the messages of a round and the data that the strategy gets from the replies.
        config: The experiment.
        run: Stores checkpoints.
        initial: The first adapter that clients draw from the run's seed.
        found: The checkpoint to resume from; None starts a new run.
        metric: Name of the primary metric, and whether higher is better.
        evaluate: Scores a state on the global test set; None skips this evaluation.
        observer: Receives the events of the run.
        join: How clients join.
        delivery: Delivers the model to devices; None in a simulation.
        snapshots: Sums of the shifts merged into the frozen weights.
        warm: The start of a run that continues an earlier adapter; None: the run starts with `initial`.
    """

    grid: Grid
    strategy: Strategy
    exchange: Exchange
    config: Config
    run: RunDirectory
    initial: AdapterState
    found: Checkpoint | None
    metric: tuple[str, bool]
    evaluate: Callable[[ServerState], Mapping[str, Any]] | None
    observer: Observer
    join: JoinPolicy = JoinPolicy()
    delivery: Delivery | None = None
    snapshots: Snapshots = field(default_factory=Snapshots)
    warm: WarmStart | None = None

    @property
    def messenger(self) -> Messenger:
        return Messenger(grid=self.grid, timeout_s=self.config.round_timeout_s, observer=self.observer)

    @cached_property
    def _start(self) -> AdapterState | None:
        """The adapter of version 0, if clients cannot draw it."""
        return self.warm.adapter if self.warm and self.warm.adapter.digest != self.initial.digest else None

    def loop(self) -> ServerState:
        """Run the remaining rounds and return the last state."""
        found = self.found
        done = found.round if found else 0
        weights = self.config.weights
        membership = Membership(self.grid, self.initial.spec.base, self.config.min_clients, self.join, self.observer, weights.max_examples)
        if share := largest_share(weights, self.config.clients_per_round, engine=self.join.expected_clients is None):
            self.observer.note(
                f"a client has at most {float(share):.3g} of the weight of a round of {self.config.clients_per_round} clients"
                f" (weights.max_share) and may report at most {weights.max_examples} examples (weights.max_examples)"
            )
        if found is not None and done == self.config.rounds and self.delivery is not None:
            return self._deliver_again(found.state, membership)
        clients = membership.gather(done + 1)
        if found is None:
            warm = self.warm or WarmStart(adapter=self.initial)
            started = dataclasses.replace(self.strategy.start(warm.adapter), exchange=self.exchange.start(), shifts=warm.shifts)
            found = Checkpoint(round=0, state=started, clients={})
            record: dict[str, Any] = {"round": 0, "client": None, **({"start": dict(warm.about)} if warm.about else {})}
            records = {c: {"round": 0, "client": c} for c in clients}
            self.observer.round_started(0, self.config.rounds, ())
            self._score(found.state, membership.connected(), record, records)
            self._close(found, record, records)
        state, book = found.state, {c: dict(v) for c, v in found.clients.items()}
        late = LateUpdates(self.config, found.late)
        if self.config.traffic.max_mb_per_round is not None and found.round < self.config.rounds:
            check_affordable(self._messages(found.round + 1, sorted(clients), clients, state))
        for round in range(found.round + 1, self.config.rounds + 1):
            started = time.perf_counter()
            connected, busy = membership.wait_for_clients(round), late.busy(round)
            busy |= paused_clients(self.grid, {c: clients[c] for c in connected if c not in busy}, round, self.observer.note)
            cohort = self._sample(self._available(connected, busy), round)
            self.observer.round_started(round, self.config.rounds, cohort)
            before = state
            state, outcome = self._train(round, cohort, clients, state, late)
            for note in self.strategy.notes(round, before, state) if state is not before else []:
                self.observer.note(note)
            record = outcome.summary(round, len(cohort), may_be_late=self.config.late == "use")
            if round % self.config.eval.every == 0 or round == self.config.rounds:
                self._score(state, membership.connected(), record, outcome.records)
            record["seconds"] = time.perf_counter() - started
            for client in cohort:
                entry = book.setdefault(client, {"counted": 0, "dropped": 0, "last": None})
                why = outcome.records[client].get("dropped")
                entry["dropped" if why else "counted"] += 1
                entry["last"] = why or f"counted in round {round}"
            for client, rounds in outcome.late.items():
                book[client]["counted"] += 1
                book[client]["last"] = f"counted in round {round}, {rounds} late"
            for client in (*cohort, *outcome.late):
                if "epsilon" in outcome.records[client]:
                    book[client]["epsilon"] = outcome.records[client]["epsilon"]
            if spent := [entry["epsilon"] for entry in book.values() if "epsilon" in entry]:
                record["epsilon"] = max(spent)  # the largest ε that any client has spent
            record.update(self.exchange.figures(round, before, state))
            self._close(Checkpoint(round=round, state=state, clients=book, late=late.kept), record, outcome.records)
            if round < self.config.rounds:
                self._deliver(round, state, membership)
        self._deliver(self.config.rounds, state, membership)
        if self.delivery is not None:
            self.delivery.end(self.config.rounds, self.grid, membership)
        return state

    # -- one round ------------------------------------------------------------------------------------------------------------------------

    def _sample(self, available: Iterable[str], round: int) -> list[str]:
        ids = sorted(available)
        chosen = random.Random(derive_seed(self.config.seed, "cohort", round)).sample(ids, min(self.config.clients_per_round, len(ids)))
        return sorted(chosen)

    def _available(self, connected: Sequence[str], busy: set[str]) -> Sequence[str]:
        """The connected clients that are neither busy with an older turn nor paused; all connected clients if there are too few of them."""
        free = [c for c in connected if c not in busy]
        return free if len(free) >= self.config.min_clients else connected

    def _train(
        self, round: int, cohort: Sequence[str], clients: Mapping[str, Client], state: ServerState, late: LateUpdates
    ) -> tuple[ServerState, RoundOutcome]:
        one = Round(round, self.config, self.messenger, clients, state, late, self.join.expected_clients is not None)
        asked = one.drop_excluded(self.exchange, cohort)
        one.address(self._messages(round, asked, clients, state))

        def does_not_count(why: str) -> tuple[ServerState, RoundOutcome]:
            self.observer.note(f"round {round} does not count: {why}; the state is unchanged")
            return state, one.outcome

        try:
            after = self.exchange.run(round, state, self.strategy, one)
        except NoUpdates:
            return does_not_count("no client sent a good update")
        if one.outcome.good < self.config.min_clients:
            return does_not_count(f"it has {one.outcome.good} good updates, fewer than min_clients={self.config.min_clients}")
        if broken := _not_finite(after):
            return does_not_count(f"'{broken}' in its result is not finite")
        return dataclasses.replace(after, adapter=after.adapter.replace(version=round)), one.outcome

    def _messages(self, round: int, ids: Sequence[str], clients: Mapping[str, Client], state: ServerState) -> dict[str, OutboundMessage]:
        assignments = self.strategy.plan(round, self._plans(round, ids, clients, state), state)
        held, started = {c: clients[c].held for c in ids}, {c: clients[c].start for c in ids}
        snapshot = self._snapshot(state)
        return write_messages(self.config, round, assignments, held, state.shifts, self.initial, snapshot, self._start, started)

    def _snapshot(self, state: ServerState) -> AdapterState | None:
        """The sums of the shifts; None also if clients need the shift of the start by itself, for their reference."""
        apart = self.warm is not None and self.warm.shifts and task_of(self.config.task).needs_reference
        return None if apart else self.snapshots.of(state.shifts)

    def _plans(self, round: int, ids: Sequence[str], clients: Mapping[str, Client], state: ServerState) -> list[Plan]:
        return [base_plan(self.config, round, c, state.adapter.spec.version, clients[c].rank) for c in ids]

    # -- around the rounds ----------------------------------------------------------------------------------------------------------------

    def _score(self, state: ServerState, clients: Mapping[str, Client], record: dict[str, Any], records: dict[str, dict[str, Any]]) -> None:
        """Add the global metrics, and the clients' metrics on their own held-out rows."""
        if self.evaluate is not None:
            record.update(self.evaluate(state))
        asked = sorted(c for c in clients if not clients[c].unanswered)
        if 0 <= self.config.eval.clients < len(asked):
            asked = sorted(random.Random(derive_seed(self.config.seed, "eval")).sample(asked, self.config.eval.clients))
        # the plan of the next round defines the client's personal tensors
        round = record["round"]
        writer, contents = MessageWriter(round, state.shifts, snapshot=self._snapshot(state)), {}
        for i in range(0, len(asked), _PLAN_BATCH):
            batch = asked[i : i + _PLAN_BATCH]
            coming = self.strategy.plan(round + 1, self._plans(round + 1, batch, clients, state), state)
            contents |= {c: writer.write(state.adapter, held=clients[c].held, next_plan=coming[c].plan) for c in batch}
        # evaluation messages do not count as the method's traffic, but their shifts do, because they are not sent again
        meter = flower.Meter()
        record["bytes_down"] = record.get("bytes_down", 0) + sum(meter(_shifts_of(content)) for content in contents.values())
        outcome = RoundOutcome(records={c: {} for c in asked})
        values, pairs = list[float](), list[tuple[float, float]]()
        name, higher = self.metric
        versions = tuple(s.spec.version for s in state.shifts)
        for client, reply in self.messenger.ask("evaluate", round, contents, clients, outcome, versions, self.messenger.until()):
            metrics = read_metrics(reply.content)
            records.setdefault(client, {"round": round, "client": client}).update(metrics)
            if name in metrics:
                values.append(metrics[name])
            if name in metrics and SHARED + name in metrics:
                pairs.append((metrics[name], metrics[SHARED + name]))
        if values:
            record["clients_mean"] = sum(values) / len(values)
            record["clients_worst_decile"] = worst_decile(values, higher_is_better=higher)
        record.update(personal_gain(pairs, higher_is_better=higher))

    def _deliver_again(self, state: ServerState, membership: Membership) -> ServerState:
        """Deliver the model of a finished run to the clients that connect within the join policy's patience. Returns the state."""
        assert self.delivery is not None
        rounds, patience = self.config.rounds, self.join.patience_s
        if self.delivery.is_due(rounds, rounds):
            self.observer.note(f"waiting for clients, to deliver the model of round {rounds}, for {patience:g} s (--wait)")
            self._deliver(rounds, state, membership, expected=self.join.expected_clients or 0, patience_s=patience)
        else:
            membership.refresh(rounds)
        self.delivery.end(rounds, self.grid, membership)
        return state

    def _deliver(self, round: int, state: ServerState, membership: Membership, *, expected: int = 0, patience_s: float = 0.0) -> None:
        """Deliver the model of this round to the devices, if it is due; `expected` and `patience_s` as for `Delivery.deliver`."""
        if self.delivery is None or not self.delivery.is_due(round, self.config.rounds):
            return
        if state.adapter.spec.version == 0 or state.adapter.spec.method != self.config.peft.method:
            return self.observer.note(f"round {round}: there is no {self.config.peft.method} adapter to deliver yet")
        offer = self.delivery.prepare(round, state.adapter, state.shifts)

        def offer_for(client: str) -> Offer:
            plans = self._plans(round + 1, [client], membership.clients, state)
            return offer(self.strategy.plan(round + 1, plans, state)[client].plan)

        self.delivery.deliver(round, self.grid, membership, offer_for, expected=expected, patience_s=patience_s)

    def _close(self, checkpoint: Checkpoint, record: dict[str, Any], clients: dict[str, dict[str, Any]]) -> None:
        """Write metrics, then the checkpoint. If the process is killed in between, a resumed run drops and rewrites the round's metrics."""
        self.observer.round_done(record, [clients[c] for c in sorted(clients)])
        self.run.save(checkpoint)


def _not_finite(state: ServerState) -> str:
    """Name of the first tensor that overflowed, such as the square of a huge but finite update; "" if there is none."""
    groups = (state.adapter.tensors, state.memory, state.exchange, *(s.tensors for s in state.shifts[-1:]))
    found = (n for tensors in groups for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all())
    return next(found, "")


def _shifts_of(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if name.startswith(("shift-", "snapshot"))})  # type: ignore[arg-type]


__all__ = ["Bridge", "Observer"]

"""One round of a run: it sends the messages, checks the replies, and yields the valid updates.

Every dropped client is recorded with the reason. Replies are fetched and aggregated one at a time in the order of logical ids: the server
needs memory for one model, and the order of the sum is fixed.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message, RecordDict

from fedtune.config import Config
from fedtune.contracts import flower
from fedtune.contracts.plan import LateUpdate, Update
from fedtune.contracts.strategy import Assignment, ServerState
from fedtune.contracts.wire import OFFER
from fedtune.errors import UpdateError
from fedtune.exchange import Exchange, NoUpdates
from fedtune.rounds.membership import Client, printable, replies
from fedtune.rounds.messenger import Messenger
from fedtune.rounds.outbox import OutboundMessage, describe_excess, max_reply_bytes
from fedtune.rounds.outcome import RoundOutcome
from fedtune.rounds.reply import SERVER_FIELDS, read_update
from fedtune.rounds.silence import record_answer
from fedtune.rounds.staleness import LateUpdates, PendingReply, apply_staleness, difference
from fedtune.rounds.weights import largest_share, max_weight


class Round:
    """The channel of one round to its cohort (`exchange.Channel`), with each client's outcome.

    Args:
        number: The round, from 1.
        config: The experiment.
        messenger: Sends the messages.
        clients: All clients, by logical id.
        state: The state before the round.
        late: Late updates and pending replies of earlier rounds.
        deployed: Whether the clients run on other machines; their weights then have a limit.
    """

    def __init__(
        self,
        number: int,
        config: Config,
        messenger: Messenger,
        clients: Mapping[str, Client],
        state: ServerState,
        late: LateUpdates,
        deployed: bool,
    ) -> None:
        self.number, self.config, self.messenger, self.clients, self.state, self.late = number, config, messenger, clients, state, late
        self.deployed, self.observer = deployed, messenger.observer
        self.outcome, self.messages = RoundOutcome(), dict[str, OutboundMessage]()
        self.versions = tuple(s.spec.version for s in state.shifts)

    @property
    def cohort(self) -> Sequence[str]:
        return [c for c, outbound in self.messages.items() if not outbound.over_limit]

    def drop_excluded(self, exchange: Exchange, cohort: Sequence[str]) -> list[str]:
        """Drop the clients that the exchange excludes, and return the others."""
        for client, (kind, why) in exchange.exclusions(self.number, cohort).items():
            self.outcome.records[client] = {"round": self.number, "client": client}
            self._drop(client, kind, why)
        return [c for c in cohort if c not in self.outcome.records]

    def address(self, messages: Mapping[str, OutboundMessage]) -> None:
        """Set the round's messages, and drop clients whose message is over the traffic limit."""
        self.messages = dict(messages)
        for client, outbound in messages.items():
            self.outcome.records[client] = {
                "round": self.number, "client": client, "bytes_down": 0 if outbound.over_limit else outbound.nbytes
            }  # fmt: skip
            if outbound.over_limit:
                self._drop(client, "traffic", outbound.over_limit)

    # -- the channel ----------------------------------------------------------------------------------------------------------------------

    def ask(self, stage: str, contents: Mapping[str, RecordDict]) -> Iterator[tuple[str, RecordDict]]:
        meter = flower.Meter()
        for client, content in contents.items():
            self._add_bytes(client, "bytes_down", meter(content))
        for client, reply in self._ask(f"query.{stage}", contents, self.messenger.until()):
            self._add_bytes(client, "bytes_up", meter(reply.content))
            yield client, reply.content

    def train(self) -> Iterator[Update]:
        until = self.messenger.until()
        contents = self._accepted({c: self.messages[c] for c in self.cohort}, until)
        for client in contents:
            if self.messages[client].start_bytes:
                self.outcome.records[client]["bytes_start"] = self.messages[client].start_bytes
        self.outcome.max_weight = self._max_weight(contents)
        answers = self.messenger.ask(
            "train",
            self.number,
            contents,
            self.clients,
            self.outcome,
            self.versions,
            until,
            lambda c, i: self.late.expect(_pending(self.messages[c], i, self.clients[c])),
            max_bytes=lambda c: max_reply_bytes(self.messages[c].assignment),
        )
        updates = map(self.outcome.weigh, itertools.chain(self._checked(answers), self._late_updates()))
        first = next(updates, None)
        if first is None:
            raise NoUpdates
        return itertools.chain([first], updates)

    def _accepted(self, messages: Mapping[str, OutboundMessage], until: float) -> dict[str, RecordDict]:
        """Contents to send. A client with missing shifts must first accept an offer, which announces the message's size."""
        offers = {c: outbound.offer for c, outbound in messages.items() if outbound.offer is not None}
        for client in offers:
            self.outcome.records[client]["bytes_down"] = flower.Meter()(offers[client])
        accepted = [c for c, _ in self._ask(OFFER, offers, until)] if offers else []
        for client in accepted:
            self.outcome.records[client]["bytes_down"] = messages[client].nbytes
        return {c: outbound.content for c, outbound in messages.items() if c in accepted or c not in offers}

    def _max_weight(self, cohort: Collection[str]) -> int | None:
        share = largest_share(self.config.weights, len(cohort), engine=not self.deployed)
        if share is None or not (limit := max_weight((self.clients[c].examples for c in cohort), share)):
            return None
        for client in (c for c in cohort if self.clients[c].examples > limit):
            examples = self.clients[client].examples
            self.observer.note(
                f"round {self.number}: client {client} has weight {limit} instead of its {examples} examples (weights.max_share)"
            )
        return limit

    def _checked(self, answers: Iterator[tuple[str, Message]]) -> Iterator[Update]:
        """The valid updates, in order; the outcome records the other clients."""
        deadline = self.config.devices.deadline_s
        for client, reply in answers:
            record, assignment = self.outcome.records[client], self.messages[client].assignment
            try:
                update = self._read(reply, assignment, self.clients[client].examples, record["bytes_down"], record)
            except UpdateError as bad:
                self._drop(client, "refused", printable(bad))
                continue
            duration_s = update.measurements.get("virtual_s", 0.0)
            if deadline is not None and duration_s > deadline:
                self.late.keep(update, assignment, duration_s)
                self._drop(client, "late", f"took {duration_s:.1f} s, deadline {deadline:g} s")
                continue
            self.observer.client_done(client, None)
            yield update

    def _read(self, reply: Message, assignment: Assignment, examples: int, bytes_down: int, record: dict[str, Any]) -> Update:
        """Read and check a reply, and add its numbers to the client's metrics. Raises UpdateError."""
        up = flower.Meter()(reply.content)
        record["bytes_up"] = record.get("bytes_up", 0) + up
        if over_limit := describe_excess(self.config.traffic.max_mb_per_round, bytes_down, up):
            raise UpdateError(over_limit)
        update = read_update(reply.content, assignment, examples=examples)
        reported = {**update.measurements, **update.metrics, "device_class": update.device_class, "examples": update.examples}
        record.update({name: value for name, value in reported.items() if name not in SERVER_FIELDS})
        if update.precision:
            record["precision"] = update.precision
        return update

    def _late_updates(self) -> Iterator[Update]:
        """Late updates for this round, applied to the current state: at most one per client, and none if the client has a newer update."""
        records = self.outcome.records
        newer = {c for c, record in records.items() if "dropped" not in record}
        for late in itertools.chain(self.late.take(self.number), self._arrived(newer)):
            client, asked = late.update.client, late.update.round
            if client in newer:
                self._skip(client, asked, "unused: a newer update of this client counts")
                continue
            newer.add(client)
            record = records.setdefault(client, {"round": self.number, "client": client})
            self.outcome.late[client] = record["staleness"] = self.number - asked
            yield apply_staleness(late, self.state.adapter, self.number - asked)

    def _arrived(self, newer: Collection[str]) -> Iterator[LateUpdate]:
        """Valid replies to earlier rounds that have arrived; does not wait."""
        for pending in self.late.pending():
            plan = pending.assignment.plan
            if plan.round == self.number or (reply := next(replies(self.messenger.grid, [pending.message], 0.0))) is None:
                continue
            self.late.resolve(pending)
            if plan.client in self.clients:
                record_answer(self.clients[plan.client])
            if reply.has_error() or "declined" in reply.content.config_records:
                continue  # the reply's own round has already recorded the client as late
            if plan.client in newer:
                self._skip(plan.client, plan.round, "unused: a newer update of this client counts")
                continue
            record = self.outcome.records.setdefault(plan.client, {"round": self.number, "client": plan.client})
            try:
                update = self._read(reply, pending.assignment, pending.examples, pending.nbytes, record)
            except UpdateError as bad:
                self._skip(plan.client, plan.round, f"refused: {printable(bad)}")
                continue
            yield LateUpdate(update=difference(update, pending.assignment.adapter), due=self.number)

    def _skip(self, client: str, asked: int, why: str) -> None:
        record = self.outcome.records.setdefault(client, {"round": self.number, "client": client})
        record["late"] = f"its reply to round {asked} is {why}"
        self.observer.note(f"client {client}: {record['late']}")

    def _ask(self, kind: str, contents: Mapping[str, RecordDict], until: float) -> Iterator[tuple[str, Message]]:
        return self.messenger.ask(kind, self.number, contents, self.clients, self.outcome, self.versions, until)

    def _drop(self, client: str, kind: str, why: str) -> None:
        self.outcome.drop(client, kind, why)
        self.observer.client_done(client, self.outcome.records[client]["dropped"])

    def _add_bytes(self, client: str, field: str, count: int) -> None:
        record = self.outcome.records[client]
        record[field] = record.get(field, 0) + count


def _pending(outbound: OutboundMessage, message: str, client: Client) -> PendingReply:
    return PendingReply(message=message, assignment=outbound.assignment, examples=client.examples, nbytes=outbound.nbytes)

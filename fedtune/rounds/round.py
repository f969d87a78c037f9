"""One round of a run: who is asked, what is sent, and which replies count.

Every reply is checked before it counts, and whoever is dropped is named. Replies are pulled and folded in the order of logical ids, one at
a time: the server's memory is that of one model, and the sum has one order.
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
from fedtune.rounds.courier import Courier
from fedtune.rounds.membership import Client, plain, replies
from fedtune.rounds.outbox import Letter, excess, most_bytes
from fedtune.rounds.reply import OURS, read_update
from fedtune.rounds.silence import forget
from fedtune.rounds.staleness import Awaited, Latecomers, caught_up, difference
from fedtune.rounds.turnout import Turnout
from fedtune.rounds.weights import heaviest, share_of


class Round:
    """One round's way to its cohort (`exchange.Channel`), and what becomes of each client.

    Args:
        number: The round, from 1.
        config: The experiment.
        courier: Brings messages.
        clients: All clients, by logical id.
        state: Before the round.
        late: Updates of earlier rounds.
        deployed: Whether the clients are other machines, whose weight is bounded.
    """

    def __init__(
        self,
        number: int,
        config: Config,
        courier: Courier,
        clients: Mapping[str, Client],
        state: ServerState,
        late: Latecomers,
        deployed: bool,
    ) -> None:
        self.number, self.config, self.courier, self.clients, self.state, self.late = number, config, courier, clients, state, late
        self.deployed, self.watcher = deployed, courier.watcher
        self.turnout, self.letters = Turnout(), dict[str, Letter]()
        self.versions = tuple(s.spec.version for s in state.shifts)

    @property
    def cohort(self) -> Sequence[str]:
        return [c for c, letter in self.letters.items() if not letter.too_much]

    def leave_out(self, exchange: Exchange, cohort: Sequence[str]) -> list[str]:
        """The clients of the cohort that the exchange lets take part; the others are named."""
        for client, (kind, why) in exchange.left_out(self.number, cohort).items():
            self.turnout.records[client] = {"round": self.number, "client": client}
            self._drop(client, kind, why)
        return [c for c in cohort if c not in self.turnout.records]

    def address(self, letters: Mapping[str, Letter]) -> None:
        """Take the round's messages; a client whose turn would cost too much is named."""
        self.letters = dict(letters)
        for client, letter in letters.items():
            self.turnout.records[client] = {
                "round": self.number, "client": client, "bytes_down": 0 if letter.too_much else letter.nbytes
            }  # fmt: skip
            if letter.too_much:
                self._drop(client, "traffic", letter.too_much)

    # -- the channel ----------------------------------------------------------------------------------------------------------------------

    def ask(self, stage: str, contents: Mapping[str, RecordDict]) -> Iterator[tuple[str, RecordDict]]:
        meter = flower.Meter()
        for client, content in contents.items():
            self._add_bytes(client, "bytes_down", meter(content))
        for client, reply in self._ask(f"query.{stage}", contents, self.courier.until()):
            self._add_bytes(client, "bytes_up", meter(reply.content))
            yield client, reply.content

    def train(self) -> Iterator[Update]:
        until = self.courier.until()
        contents = self._accepted({c: self.letters[c] for c in self.cohort}, until)
        self.turnout.heaviest = self._heaviest(contents)
        answers = self.courier.ask(
            "train",
            self.number,
            contents,
            self.clients,
            self.turnout,
            self.versions,
            until,
            lambda c, i: self.late.expect(_awaited(self.letters[c], i, self.clients[c])),
            most=lambda c: most_bytes(self.letters[c].assignment),
        )
        updates = map(self.turnout.weigh, itertools.chain(self._checked(answers), self._belated()))
        first = next(updates, None)
        if first is None:
            raise NoUpdates
        return itertools.chain([first], updates)

    def _accepted(self, letters: Mapping[str, Letter], until: float) -> dict[str, RecordDict]:
        """What is sent: to a client that lacks shifts only once it has said that a message of that size fits it."""
        offers = {c: letter.offer for c, letter in letters.items() if letter.offer is not None}
        for client in offers:
            self.turnout.records[client]["bytes_down"] = flower.Meter()(offers[client])
        accepted = [c for c, _ in self._ask(OFFER, offers, until)] if offers else []
        for client in accepted:
            self.turnout.records[client]["bytes_down"] = letters[client].nbytes
        return {c: letter.content for c, letter in letters.items() if c in accepted or c not in offers}

    def _heaviest(self, cohort: Collection[str]) -> int | None:
        share = share_of(self.config.weights, len(cohort), engine=not self.deployed)
        if share is None or not (most := heaviest((self.clients[c].examples for c in cohort), share)):
            return None
        for client in (c for c in cohort if self.clients[c].examples > most):
            has = self.clients[client].examples
            self.watcher.note(f"round {self.number}: client {client} counts {most} of its {has} examples: weights.max_share")
        return most

    def _checked(self, answers: Iterator[tuple[str, Message]]) -> Iterator[Update]:
        """The good updates, in order; the others are named in the turnout."""
        deadline = self.config.devices.deadline_s
        for client, reply in answers:
            record, assignment = self.turnout.records[client], self.letters[client].assignment
            try:
                update = self._read(reply, assignment, self.clients[client].examples, record["bytes_down"], record)
            except UpdateError as bad:
                self._drop(client, "refused", plain(bad))
                continue
            took = update.measurements.get("virtual_s", 0.0)
            if deadline is not None and took > deadline:
                self.late.keep(update, assignment, took)
                self._drop(client, "late", f"{took:.1f} s of {deadline:g} s")
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

    def _belated(self) -> Iterator[Update]:
        """Replies to earlier rounds that are there now, moved onto the state of today: of each client one, and none beside a newer one."""
        records = self.turnout.records
        newer = {c for c, record in records.items() if "dropped" not in record}
        for one in itertools.chain(self.late.take(self.number), self._arrived(newer)):
            client, asked = one.update.client, one.update.round
            if client in newer:
                self._pass_over(client, asked, "left out: a newer one of it counts")
                continue
            newer.add(client)
            record = records.setdefault(client, {"round": self.number, "client": client})
            self.turnout.late[client] = record["staleness"] = self.number - asked
            yield caught_up(one, self.state.adapter, self.number - asked)

    def _arrived(self, newer: Collection[str]) -> Iterator[LateUpdate]:
        """Good replies to messages of earlier rounds that have come by now; nobody waits for them."""
        for awaited in self.late.awaited():
            plan = awaited.assignment.plan
            if plan.round == self.number or (reply := next(replies(self.courier.grid, [awaited.message], 0.0))) is None:
                continue
            self.late.came(awaited)
            if plan.client in self.clients:
                forget(self.clients[plan.client])
            if reply.has_error() or "declined" in reply.content.config_records:
                continue  # it was named as late in its own round
            if plan.client in newer:
                self._pass_over(plan.client, plan.round, "left out: a newer one of it counts")
                continue
            record = self.turnout.records.setdefault(plan.client, {"round": self.number, "client": plan.client})
            try:
                update = self._read(reply, awaited.assignment, awaited.examples, awaited.nbytes, record)
            except UpdateError as bad:
                self._pass_over(plan.client, plan.round, f"refused: {plain(bad)}")
                continue
            yield LateUpdate(update=difference(update, awaited.assignment.adapter), due=self.number)

    def _pass_over(self, client: str, asked: int, why: str) -> None:
        record = self.turnout.records.setdefault(client, {"round": self.number, "client": client})
        record["late"] = f"its reply to round {asked} is {why}"
        self.watcher.note(f"client {client}: {record['late']}")

    def _ask(self, kind: str, contents: Mapping[str, RecordDict], until: float) -> Iterator[tuple[str, Message]]:
        return self.courier.ask(kind, self.number, contents, self.clients, self.turnout, self.versions, until)

    def _drop(self, client: str, kind: str, why: str) -> None:
        self.turnout.drop(client, kind, why)
        self.watcher.client_done(client, self.turnout.records[client]["dropped"])

    def _add_bytes(self, client: str, way: str, count: int) -> None:
        record = self.turnout.records[client]
        record[way] = record.get(way, 0) + count


def _awaited(letter: Letter, message: str, client: Client) -> Awaited:
    return Awaited(message=message, assignment=letter.assignment, examples=client.examples, nbytes=letter.nbytes)

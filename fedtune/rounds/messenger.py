"""Sends messages to clients, waits for their replies, and reports the clients that do not answer."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.contracts.wire import OFFER, start_in
from fedtune.rounds.membership import SMALL_REPLY_BYTES, Client, push, replies
from fedtune.rounds.outcome import RoundOutcome, epsilon_of, refusal
from fedtune.rounds.silence import record_answer, record_miss


class Observer(Protocol):
    """Receives the events of a run, for the terminal, the metrics file and the report."""

    def client_known(self, client: str, node: int, device_class: str) -> None: ...
    def round_started(self, round: int, rounds: int, cohort: Sequence[str]) -> None: ...
    def client_done(self, client: str, dropped: str | None) -> None: ...
    def round_done(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Messenger:
    """Sends messages to clients on a grid.

    Args:
        grid: Flower's grid, or another with its interface.
        timeout_s: Maximum wait for a reply; None waits without limit.
        observer: Receives the events.
    """

    grid: Grid
    timeout_s: float | None
    observer: Observer

    def until(self) -> float:
        """The deadline (on the clock `time.monotonic`) for replies to messages sent now."""
        return math.inf if self.timeout_s is None else time.monotonic() + self.timeout_s

    def ask(
        self,
        kind: str,
        round: int,
        contents: Mapping[str, RecordDict],
        clients: Mapping[str, Client],
        outcome: RoundOutcome,
        versions: tuple[int, ...],
        until: float,
        unanswered: Callable[[str, str], None] = lambda client, message: None,
        max_bytes: Callable[[str], int] = lambda client: SMALL_REPLY_BYTES,
    ) -> Iterator[tuple[str, Message]]:
        """Send each client its content. Yield the replies in the order of logical ids, and record the clients without a result.

        Args:
            kind: Flower's message type.
            round: The round.
            contents: Logical id → content of the message.
            clients: All clients, by logical id.
            outcome: Receives the clients whose reply is missing or has no result.
            versions: Versions of the shifts that a client has after it answers.
            until: Deadline of the replies.
            unanswered: Called with the id of each client whose reply may arrive later, and the message's id.
            max_bytes: Logical id → maximum bytes of this client's reply.
        """
        messages = {c: Message(contents[c], clients[c].node, kind, group_id=str(round)) for c in sorted(contents)}
        asked = list(messages)
        ids = push(self.grid, list(messages.values()), lambda i: max_bytes(asked[i]))
        for client, i, reply in zip(messages, ids, replies(self.grid, ids, until), strict=True):
            if reply is None:
                why = ("late", f"no reply within {self.timeout_s:g} s")
                if i:  # it was sent
                    unanswered(client, i)
                    record_miss(client, clients[client], round, i, self.observer.note)
            else:
                if kind == "train":
                    record_answer(clients[client])
                why = refusal(reply)
                if why is None:
                    if clients[client].remembers and kind != OFFER:
                        clients[client].held = versions
                        clients[client].start = start_in(contents[client]) or clients[client].start
                    yield client, reply
                    continue
                if why[0] == "failed":
                    clients[client].held, clients[client].start = (), ""  # a device that failed may have restarted and lost both
            record = outcome.records.setdefault(client, {"round": round, "client": client})
            if reply is not None and (spent := epsilon_of(reply)) is not None:
                record["epsilon"] = spent
            outcome.drop(client, *why)
            self.observer.client_done(client, ": ".join(why))

"""Sends messages to clients, waits for their replies, and names the clients that do not answer."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.contracts.wire import OFFER
from fedtune.rounds.membership import FEW_BYTES, Client, push, replies
from fedtune.rounds.silence import forget, miss
from fedtune.rounds.turnout import Turnout, epsilon_of, refusal


class Watcher(Protocol):
    """Receives the events of a run, for the terminal, the metrics file and the report."""

    def client_known(self, client: str, node: int, device_class: str) -> None: ...
    def round_started(self, round: int, rounds: int, cohort: Sequence[str]) -> None: ...
    def client_done(self, client: str, dropped: str | None) -> None: ...
    def round_done(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Courier:
    """Sends messages on a grid.

    Args:
        grid: Flower's grid, or any other of its shape.
        timeout_s: How long a reply may take; None waits.
        watcher: Receives the events.
    """

    grid: Grid
    timeout_s: float | None
    watcher: Watcher

    def until(self) -> float:
        """When the replies to what is sent now must be there, by `time.monotonic`."""
        return math.inf if self.timeout_s is None else time.monotonic() + self.timeout_s

    def ask(
        self,
        kind: str,
        round: int,
        contents: Mapping[str, RecordDict],
        clients: Mapping[str, Client],
        turnout: Turnout,
        versions: tuple[int, ...],
        until: float,
        unanswered: Callable[[str, str], None] = lambda client, message: None,
        most: Callable[[str], int] = lambda client: FEW_BYTES,
    ) -> Iterator[tuple[str, Message]]:
        """Send each client its content; yield the replies that came, in the order of logical ids; name the clients whose reply did not.

        Args:
            kind: Flower's message type.
            round: The round.
            contents: Logical id → what is sent.
            clients: What is known of the clients.
            turnout: Gets the clients whose reply did not come or holds no result.
            versions: Of the shifts that a client holds once it has answered.
            until: When the replies must be there.
            unanswered: Called with a client whose reply may still come, and the id of the message.
            most: How many bytes a client's reply may take.
        """
        messages = {c: Message(contents[c], clients[c].node, kind, group_id=str(round)) for c in sorted(contents)}
        asked = list(messages)
        ids = push(self.grid, list(messages.values()), lambda i: most(asked[i]))
        for client, i, reply in zip(messages, ids, replies(self.grid, ids, until), strict=True):
            if reply is None:
                why = ("late", f"no reply within {self.timeout_s:g} s")
                if i:  # it was sent
                    unanswered(client, i)
                    miss(client, clients[client], round, i, self.watcher.note)
            else:
                if kind == "train":
                    forget(clients[client])
                why = refusal(reply)
                if why is None:
                    if clients[client].remembers and kind != OFFER:
                        clients[client].held = versions
                    yield client, reply
                    continue
                if why[0] == "failed":
                    clients[client].held = ()  # a device that failed may have restarted, and then holds nothing
            record = turnout.records.setdefault(client, {"round": round, "client": client})
            if reply is not None and (spent := epsilon_of(reply)) is not None:
                record["epsilon"] = spent
            turnout.drop(client, *why)
            self.watcher.client_done(client, ": ".join(why))

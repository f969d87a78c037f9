"""Membership: the connected clients, identified by the logical ids that their nodes (of Flower's grid) report in their hellos.

A simulation's nodes are connected from start to end. On a network, nodes join late, leave and return. With keys, a node returns with the
same node id; without keys, with a new one. The run therefore identifies a client by its logical id.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.contracts.hello import REJECTED, ClientHello
from fedtune.errors import RunError
from fedtune.storage.ids import flaw, shown

POLL_S = 0.05
SMALL_REPLY_BYTES = 1_000_000  # maximum size of a reply without tensors
_STRAGGLERS_S = 10.0  # maximum wait for the hellos of other connected nodes after enough clients have joined


@dataclass
class Client:
    """The server's record of a connected client.

    Args:
        node: Flower's node id.
        device_class: Its device class; "" if it has none.
        examples: Training rows that its hello reports.
        held: Versions of the shifts merged into its frozen weights.
        remembers: Whether it keeps these shifts until its next turn.
        held_out: Number of its held-out rows, for its own evaluation.
        rank: LoRA rank that it requests; None means the config's.
        missed: Consecutive rounds that ended before its reply arrived (fedtune/rounds/silence.py).
        paused_until: First round in which it may be selected again.
        unanswered: Id of the message that it has not answered; "" if there is none.
        start: Digest of the start of a warm start that it holds; "" for none.
    """

    node: int
    device_class: str
    examples: int
    held: tuple[int, ...]
    remembers: bool
    held_out: int = 0
    rank: int | None = None
    missed: int = 0
    paused_until: int = 0
    unanswered: str = ""
    start: str = ""


@dataclass(frozen=True, kw_only=True)
class JoinPolicy:
    """How nodes join the run.

    Args:
        hello: Fields of the server's hello.
        patience_s: Seconds to wait for nodes to connect and send their hello, and for enough clients to return.
        expected_clients: Clients to wait for before the first round; after `patience_s`, `min_clients` are enough. None: a simulation; its
            nodes are all connected from the start and must all answer.
        names: Returns node id → the client id that belongs to the node's key; a node may participate only with this id. None: no keys.
        retry_s: Seconds until the server asks a rejected node again; infinite in a simulation, because the answer would not change.
    """

    hello: Mapping[str, Any] = field(default_factory=dict)
    patience_s: float = 300.0
    expected_clients: int | None = None
    names: Callable[[], Mapping[int, str]] | None = None
    retry_s: float = math.inf


@runtime_checkable
class BoundedGrid(Protocol):
    """A grid that can reject a large reply before fetching it. A simulation's replies are already on this machine and need no limit."""

    def push_bounded(self, messages: Sequence[Message], most: Sequence[int]) -> Sequence[str]: ...


class MembershipObserver(Protocol):
    """Receives membership events."""

    def client_known(self, client: str, node: int, device_class: str) -> None: ...
    def note(self, text: str) -> None: ...


class Membership:
    """The clients of a run.

    Args:
        grid: Flower's grid.
        base: Fingerprint of the run's backbone; a client with another backbone is rejected.
        min_clients: Minimum number of clients in a round.
        policy: How nodes join.
        observer: Receives new and rejected clients.
        max_examples: Maximum number of rows that a client may report.
    """

    def __init__(
        self, grid: Grid, base: str, min_clients: int, policy: JoinPolicy, observer: "MembershipObserver", max_examples: int
    ) -> None:
        self._grid, self._base, self._min_clients, self._policy, self._max_examples = grid, base, min_clients, policy, max_examples
        self._note, self._client_known = observer.note, observer.client_known
        self.clients: dict[str, Client] = {}
        self._nodes: set[int] = set()
        self._pending: dict[int, tuple[str, float]] = {}  # node → id of an unanswered hello, and the time when it was sent
        self._rejected: dict[int, tuple[float, str]] = {}  # node → time and reason
        self._reported: dict[int, str] = {}  # node → the last reason that was reported

    def gather(self, round: int) -> dict[str, Client]:
        """Wait until nodes are connected and all have answered the hello; report those that do not.

        On a network, keep waiting while too few clients can participate: an early rejected node must not end the run.

        Raises:
            RunError: Too few clients can participate.
        """
        began = enough = time.monotonic()
        expected, reported = max(self._min_clients, self._policy.expected_clients or 0), -1
        while True:
            before = self._nodes
            self.refresh(round)
            now, count = time.monotonic(), len(self.connected())
            settled = not self._pending and self._nodes == before and len(self._nodes) >= expected
            if self._policy.expected_clients is None:
                done = settled
            else:
                enough = enough if count >= expected else now
                done = count >= expected and (settled or now - enough > _STRAGGLERS_S)
                if count != reported:
                    reported = count
                    self._note(f"{count} of {expected} clients are connected")
            if done or now - began > self._policy.patience_s:
                break
            time.sleep(POLL_S)
        for node in sorted(self._pending):
            self._reject(node, f"{self._label(node)}: no reply", notify=False)
        if len(self.clients) < self._min_clients:
            raise RunError(self._too_few(len(self.clients), "can take part"))
        return self.clients

    def wait_for_clients(self, round: int) -> list[str]:
        """Logical ids of the clients that are connected at the start of the round. New nodes get a hello, and join when they answer it.

        Raises:
            RunError: Too few clients connected within `patience_s`.
        """
        until = time.monotonic() + self._policy.patience_s
        while True:
            self.refresh(round)
            if len(connected := self.connected()) >= self._min_clients:
                return sorted(connected)
            if time.monotonic() > until:
                raise RunError(self._too_few(len(connected), f"were connected for {self._policy.patience_s:g} s"))
            time.sleep(POLL_S)

    def refresh(self, round: int) -> None:
        """Look up the connected nodes, send a hello to new ones, and read the answers that have arrived."""
        nodes, now = set(self._grid.get_node_ids()), time.monotonic()
        self._pending = {n: sent for n, sent in self._pending.items() if n in nodes}
        again = {n for n, (when, _) in self._rejected.items() if now - when > self._policy.retry_s}
        if self._policy.retry_s < math.inf:  # the hello may be lost: send another, and ignore answers to the first
            again |= {n for n, (_, when) in self._pending.items() if now - when > self._policy.patience_s}
            self._pending = {n: sent for n, sent in self._pending.items() if n not in again}
        self._send_hello((nodes - self._nodes | again & nodes) - set(self._pending), round)
        self._nodes = nodes
        for node, (i, _) in sorted(self._pending.items()):
            if (reply := next(replies(self._grid, [i], 0.0))) is not None:
                del self._pending[node]
                self._read_hello(node, reply)

    @property
    def waits_for_hello(self) -> bool:
        """Whether a node has not answered its hello yet."""
        return bool(self._pending)

    def connected(self) -> dict[str, Client]:
        """The clients whose nodes were connected at the last refresh."""
        return {c: known for c, known in self.clients.items() if known.node in self._nodes}

    def _send_hello(self, nodes: set[int], round: int) -> None:
        ids = sorted(nodes)
        text = json.dumps({**self._policy.hello, "round": round})
        messages = [Message(RecordDict({"hello": ConfigRecord({"json": text})}), i, "query", group_id="0") for i in ids]
        for node, i in zip(ids, push(self._grid, messages, lambda _: SMALL_REPLY_BYTES) if messages else (), strict=True):
            self._pending[node] = i, time.monotonic()
            self._rejected.pop(node, None)

    def _read_hello(self, node: int, reply: Message) -> None:
        """Admit the node's client, or reject the node with a reason."""
        if reply.has_error() or "declined" in reply.content.config_records:
            declined = {} if reply.has_error() else reply.content.config_records["declined"]
            why = reply.error.reason if reply.has_error() else declined.get("why", "")
            return self._reject(node, f"{self._label(node, str(declined.get('client', '')))}: {printable(why)}", notify=False)
        try:
            hello = ClientHello.from_json(str(reply.content.config_records["hello"]["json"]))
        except (KeyError, ValueError):
            return self._reject(node, f"{self._label(node)}: its hello cannot be read")
        client = hello.client
        if wrong := flaw(client):
            return self._reject(node, f"{self._label(node)}: its client id '{shown(client)}' {wrong}: give it another")
        if hello.base != self._base:
            return self._reject(node, f"client {client} has backbone {hello.base[:12]}, but the run has {self._base[:12]}")
        if self._policy.names is not None and (name := self._policy.names().get(node, "")) != client:
            who = "a client" if name else f"node {node}"
            return self._reject(node, f"{who} has the key of '{name}' but the id '{client}': correct its --client-id or its key")
        if (rows := max(hello.examples, hello.held_out)) > self._max_examples:
            return self._reject(
                node,
                f"client {client} reports {min(rows, 10**12)} rows, more than weights.max_examples={self._max_examples}: raise that on the"
                " server if the number is right",
            )
        other = self.clients.get(client)
        if other is not None and other.node != node and other.node in self._nodes:
            return self._reject(node, f"two nodes have the client id {client}")
        self.clients[client] = Client(
            node=node,
            device_class=printable(hello.device_class, 64),
            examples=hello.examples,
            held_out=hello.held_out,
            held=hello.shifts,
            remembers=hello.remembers,
            rank=hello.rank,
            start=hello.start,
        )
        self._client_known(client, node, self.clients[client].device_class)

    def _label(self, node: int, claimed: str = "") -> str:
        """The node's client, from its key, its earlier hello or its claimed id; else the node id."""
        if self._policy.names is not None:
            name = self._policy.names().get(node, "")
        else:
            name = next((c for c, known in self.clients.items() if known.node == node), printable(claimed, 200))
        return f"client {name}" if name else f"node {node}"

    def _reject(self, node: int, why: str, *, notify: bool = True) -> None:
        """Report the rejection of a node. With `notify`, tell its client on a network, too: not needed if the client gave the reason."""
        if self._reported.get(node) != why:
            self._note(f"rejected: {why}")
            if notify and self._policy.expected_clients is not None:
                content = RecordDict({"rejected": ConfigRecord({"why": why})})
                push(self._grid, [Message(content, node, REJECTED, group_id="0")], lambda _: SMALL_REPLY_BYTES)
        self._reported[node] = why
        self._rejected[node] = time.monotonic(), why

    def _too_few(self, count: int, what: str) -> str:
        reasons = [why for _, why in self._rejected.values()]
        return f"{count} clients {what}, min_clients={self._min_clients}: " + ("; ".join(reasons[:3]) or "no other node is connected")


def printable(text: object, max_length: int = 500) -> str:
    """A peer's text, safe for a terminal and a log: without control characters, truncated to `max_length`."""
    return "".join(c if c.isprintable() else " " for c in str(text or "")[:max_length])


def push(grid: Grid, messages: Sequence[Message], max_bytes: Callable[[int], int]) -> Sequence[str]:
    """Send messages and return their ids.

    Args:
        grid: Flower's grid.
        messages: At least one.
        max_bytes: Index of a message → maximum bytes of its reply; called only for a `BoundedGrid`.
    """
    if isinstance(grid, BoundedGrid):
        return grid.push_bounded(messages, [max_bytes(i) for i in range(len(messages))])
    return list(grid.push_messages(messages))


def replies(grid: Grid, ids: Sequence[str | None], until: float) -> Iterator[Message | None]:
    """Yield the reply to each message in order; None if there is no reply before the deadline. Replies that arrived in time are yielded
    even if they are read after it.

    Args:
        grid: Flower's grid.
        ids: Ids of the messages, in the order of the replies; empty or None for a message that could not be sent.
        until: Deadline on the clock `time.monotonic`; infinity waits without limit.
    """
    for i in ids:
        while True:
            got = list(grid.pull_messages([i])) if i else []
            if got or not i or time.monotonic() > until:
                yield got[0] if got else None
                break
            time.sleep(POLL_S)

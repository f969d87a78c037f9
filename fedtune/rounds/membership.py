"""Who is there: nodes of Flower's grid, known by the logical ids that they give when they say hello.

A simulation's nodes are there from the start and stay. On a network nodes come late, go, and come back, under the same node id where they
have keys, under another where they have none: the logical id is what the run knows them by.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.contracts.hello import ClientHello
from fedtune.errors import RunError
from fedtune.storage.ids import flaw, shown

POLL_S = 0.05
FEW_BYTES = 1_000_000  # of a reply that holds no tensors
_STRAGGLERS_S = 10.0  # once enough are there: whoever is connected and says nothing does not keep them waiting


@dataclass
class Client:
    """What the server knows of a connected client.

    Args:
        node: Flower's node id.
        device_class: Its class; "" where there is none.
        examples: Training rows that it said it has.
        held: Versions of the shifts that its frozen weights carry.
        remembers: Whether they still will in its next turn.
        held_out: Rows that it evaluates itself on.
        rank: LoRA rank that it asks for; None is the config's.
        missed: Replies in a row that did not come in their round (fedtune/rounds/silence.py).
        back: Round before which it is not asked again.
        owes: Id of the message that it has not answered; "" where there is none.
    """

    node: int
    device_class: str
    examples: int
    held: tuple[int, ...]
    remembers: bool
    held_out: int = 0
    rank: int | None = None
    missed: int = 0
    back: int = 0
    owes: str = ""


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """How nodes are let in.

    Args:
        said: What the server says in its hello.
        patience_s: Seconds to wait for nodes to connect and say hello, and for enough of them to come back.
        wanted: How many clients are waited for before the first round; fewer will do once the time is up. None: the nodes are those of an
            engine, which are all there from the start and of which every one is heard.
        names: Asked for the name that each node has proved by its key, under which alone it may take part; None where nodes have no keys.
        again_s: Seconds after which a node that was refused is asked anew; a simulation's node would say the same for ever.
    """

    said: Mapping[str, Any] = field(default_factory=dict)
    patience_s: float = 300.0
    wanted: int | None = None
    names: Callable[[], Mapping[int, str]] | None = None
    again_s: float = math.inf


@runtime_checkable
class Bounded(Protocol):
    """A grid that can refuse a large reply before it fetches it; replies of an engine are in this machine already."""

    def push_bounded(self, messages: Sequence[Message], most: Sequence[int]) -> Sequence[str]: ...


class Listener(Protocol):
    """Who is told."""

    def client_known(self, client: str, node: int, device_class: str) -> None: ...
    def note(self, text: str) -> None: ...


class Roll:
    """The clients of a run.

    Args:
        grid: Flower's grid.
        base: Fingerprint of the run's backbone; who holds another one is left out.
        least: Fewest clients that a round can do with.
        welcome: How nodes are let in.
        watcher: Who is told of those that come and those that are left out.
        most: Largest number of rows that a client may say it has.
    """

    def __init__(self, grid: Grid, base: str, least: int, welcome: Welcome, watcher: "Listener", most: int) -> None:
        self._grid, self._base, self._least, self._welcome, self._most = grid, base, least, welcome, most
        self._note, self._known = watcher.note, watcher.client_known
        self.clients: dict[str, Client] = {}
        self._nodes: set[int] = set()
        self._asked: dict[int, tuple[str, float]] = {}  # node → message of a hello that is not answered yet, and when it was sent
        self._refused: dict[int, tuple[float, str]] = {}  # node → when, and why

    def gather(self, round: int) -> dict[str, Client]:
        """Wait for nodes, and for all of them to say hello; who does not is left out by name.

        On a network it goes on waiting while those that can take part are too few: a stranger among the first must not end the run.

        Raises:
            RunError: Too few can take part.
        """
        began = enough = time.monotonic()
        wanted, told = max(self._least, self._welcome.wanted or 0), -1
        while True:
            before = self._nodes
            self._look(round)
            now, here = time.monotonic(), len(self.here())
            settled = not self._asked and self._nodes == before and len(self._nodes) >= wanted
            if self._welcome.wanted is None:
                done = settled
            else:
                enough = enough if here >= wanted else now
                done = here >= wanted and (settled or now - enough > _STRAGGLERS_S)
                if here != told:
                    told = here
                    self._note(f"{told} of {wanted} clients are there")
            if done or now - began > self._welcome.patience_s:
                break
            time.sleep(POLL_S)
        for node in sorted(self._asked):
            self._leave_out(node, f"{self._who(node)}: no reply")
        if len(self.clients) < self._least:
            raise RunError(self._too_few(len(self.clients), "can take part"))
        return self.clients

    def present(self, round: int) -> list[str]:
        """Logical ids of the clients that are connected as the round begins; newcomers are asked, and heard once they have answered.

        Raises:
            RunError: Too few were connected for as long as the server is patient.
        """
        until = time.monotonic() + self._welcome.patience_s
        while True:
            self._look(round)
            if len(here := self.here()) >= self._least:
                return sorted(here)
            if time.monotonic() > until:
                raise RunError(self._too_few(len(here), f"were connected for {self._welcome.patience_s:g} s"))
            time.sleep(POLL_S)

    def _look(self, round: int) -> None:
        """See who is connected, ask newcomers, and hear those that have answered."""
        now, at = set(self._grid.get_node_ids()), time.monotonic()
        self._asked = {n: asked for n, asked in self._asked.items() if n in now}
        again = {n for n, (when, _) in self._refused.items() if at - when > self._welcome.again_s}
        if self._welcome.again_s < math.inf:  # a hello that is lost on its way is delivered once more, not twice
            again |= {n for n, (_, when) in self._asked.items() if at - when > self._welcome.patience_s}
            self._asked = {n: asked for n, asked in self._asked.items() if n not in again}
        self._ask((now - self._nodes | again & now) - set(self._asked), round)
        self._nodes = now
        for node, (i, _) in sorted(self._asked.items()):
            if (reply := next(replies(self._grid, [i], 0.0))) is not None:
                del self._asked[node]
                self._hear(node, reply)

    def here(self) -> dict[str, Client]:
        """The clients whose nodes were connected when the grid was last asked."""
        return {c: known for c, known in self.clients.items() if known.node in self._nodes}

    def _ask(self, nodes: set[int], round: int) -> None:
        ids = sorted(nodes)
        text = json.dumps({**self._welcome.said, "round": round})
        messages = [Message(RecordDict({"hello": ConfigRecord({"json": text})}), i, "query", group_id="0") for i in ids]
        for node, i in zip(ids, push(self._grid, messages, lambda _: FEW_BYTES) if messages else (), strict=True):
            self._asked[node] = i, time.monotonic()
            self._refused.pop(node, None)

    def _hear(self, node: int, reply: Message) -> None:
        """Let the node in, or say why not."""
        if reply.has_error() or "declined" in reply.content.config_records:
            declined = {} if reply.has_error() else reply.content.config_records["declined"]
            said = reply.error.reason if reply.has_error() else declined.get("why", "")
            return self._leave_out(node, f"{self._who(node, str(declined.get('client', '')))}: {plain(said)}")
        try:
            hello = ClientHello.from_json(str(reply.content.config_records["hello"]["json"]))
        except (KeyError, ValueError):
            return self._leave_out(node, f"{self._who(node)}: its hello cannot be read")
        client = hello.client
        if wrong := flaw(client):
            return self._leave_out(node, f"{self._who(node)}: its client id '{shown(client)}' {wrong}: give it another")
        if hello.base != self._base:
            return self._leave_out(node, f"client {client} holds another backbone ({hello.base[:12]}) than the run ({self._base[:12]})")
        if self._welcome.names is not None and (name := self._welcome.names().get(node, "")) != client:
            who = "a client" if name else f"node {node}"
            return self._leave_out(node, f"{who} has the key of '{name}' and calls itself '{client}': set its --client-id, or its key")
        if (rows := max(hello.examples, hello.held_out)) > self._most:
            return self._leave_out(
                node,
                f"client {client} says that it has {min(rows, 10**12)} rows, at most weights.max_examples={self._most} are believed: raise"
                " that on the server if it does",
            )
        other = self.clients.get(client)
        if other is not None and other.node != node and other.node in self._nodes:
            return self._leave_out(node, f"two nodes call themselves client {client}")
        self.clients[client] = Client(
            node=node,
            device_class=plain(hello.device_class, 64),
            examples=hello.examples,
            held_out=hello.held_out,
            held=hello.shifts,
            remembers=hello.remembers,
            rank=hello.rank,
        )
        self._known(client, node, self.clients[client].device_class)

    def _who(self, node: int, claimed: str = "") -> str:
        """A node's client, as it is known: by its key, by an earlier hello, by what it claims; else the node's number."""
        if self._welcome.names is not None:
            name = self._welcome.names().get(node, "")
        else:
            name = next((c for c, known in self.clients.items() if known.node == node), plain(claimed, 200))
        return f"client {name}" if name else f"node {node}"

    def _leave_out(self, node: int, why: str) -> None:
        if self._refused.get(node, (0.0, ""))[1] != why:
            self._note(f"left out, {why}")
        self._refused[node] = time.monotonic(), why

    def _too_few(self, count: int, what: str) -> str:
        whys = [why for _, why in self._refused.values()]
        return f"{count} clients {what}, min_clients={self._least}: " + ("; ".join(whys[:3]) or "no other is connected")


def plain(said: object, longest: int = 500) -> str:
    """What a peer said, fit for a terminal and a log: no control characters, not too long."""
    return "".join(c if c.isprintable() else " " for c in str(said or "")[:longest])


def push(grid: Grid, messages: Sequence[Message], most: Callable[[int], int]) -> Sequence[str]:
    """Send messages, and get their ids.

    Args:
        grid: Flower's grid.
        messages: At least one.
        most: Position of a message → bytes that its reply may take; asked only where the grid can tell before it fetches a reply.
    """
    if isinstance(grid, Bounded):
        return grid.push_bounded(messages, [most(i) for i in range(len(messages))])
    return list(grid.push_messages(messages))


def replies(grid: Grid, ids: Sequence[str | None], until: float) -> Iterator[Message | None]:
    """The reply to each message in turn, None where none came in time. Once the time is up, what has already come is still taken.

    Args:
        grid: Flower's grid.
        ids: Of the messages, in the order in which their replies are wanted; empty or None for one that could not be sent.
        until: By `time.monotonic`; infinity waits.
    """
    for i in ids:
        while True:
            got = list(grid.pull_messages([i])) if i else []
            if got or not i or time.monotonic() > until:
                yield got[0] if got else None
                break
            time.sleep(POLL_S)

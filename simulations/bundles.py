"""Many clients' messages in one, so that each of Ray's workers can train its share of a cohort at once.

Flower's simulation engine hands a worker one message at a time. So, between the bridge and Flower's grid, the messages of a round are
bundled: a bundle is an ordinary message to the node of its first client, and holds the others' contents beside its own. The worker answers
all of them and sends one reply, which is taken apart again: neither the bridge nor a client knows of it. A record that many clients get,
such as the round's adapter, goes to a worker once.

A bundle   clients      ConfigRecord   JSON: for each message its partition and group, and record name → name in the bundle
           r0, r1, …    the records
A reply    replies      ConfigRecord   JSON: for each message, in order, record name → name in the bundle
           r0, r1, …    the records
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune import flower
from fedtune.clients.declining import declined
from fedtune.simulations.grid import Together

LARGEST = 32  # clients of a bundle: with more, a worker's replies would need too much memory at once


class BundlingGrid(Grid):
    """Another grid, with the messages of a type (train, evaluate) bundled.

    Args:
        grid: Flower's.
        workers: How many bundles can be answered at the same time; asked when the first are made.
    """

    def __init__(self, grid: Grid, workers: Callable[[], int]) -> None:
        self._grid, self._workers = grid, workers
        self._partition: dict[int, int] = {}  # node → partition, from the nodes' hellos
        self._bundle: dict[str, str] = {}  # message → the bundle that it went with
        self._inside: dict[str, list[Message]] = {}
        self._ready: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        if not all(m.metadata.message_type in ("train", "evaluate") and m.metadata.dst_node_id in self._partition for m in messages):
            return self._grid.push_messages(messages)
        ids, shares = [flower.stamp(m) for m in messages], list(_shares(messages, self._workers()))
        sent = self._grid.push_messages([self._bundled(share) for share in shares])
        for bundle, share in zip(sent, shares, strict=True):
            self._inside[bundle] = share
            self._bundle |= {m.metadata.message_id: bundle for m in share}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        bundles = dict.fromkeys(self._bundle[i] for i in ids if i in self._bundle and i not in self._ready)
        plain = [i for i in ids if i not in self._bundle and i not in self._ready]
        replies = list(self._grid.pull_messages([*bundles, *plain])) if bundles or plain else []
        out = []
        for reply in replies:
            of = reply.metadata.reply_to_message_id
            if of in self._inside:
                self._unbundle(self._inside.pop(of), reply)
            else:
                self._note_partition(reply)
                out.append(reply)
        for i in ids:
            if i in self._ready:
                out.append(self._ready.pop(i))
                del self._bundle[i]
        return out

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("fedtune's bridge pushes and pulls")

    def _bundled(self, share: Sequence[Message]) -> Message:
        first = share[0].metadata
        headers = [{"node": m.metadata.dst_node_id, "partition": self._partition[m.metadata.dst_node_id]} for m in share]
        content = _pack("clients", headers, [m.content for m in share])
        return Message(content, first.dst_node_id, first.message_type, ttl=first.ttl, group_id=first.group_id)

    def _unbundle(self, share: Sequence[Message], reply: Message) -> None:
        if reply.has_error():
            error = reply.error
            answers = [Message(Error(code=error.code, reason=error.reason), reply_to=m) for m in share]
        else:
            answers = [Message(content, reply_to=m) for m, (_, content) in zip(share, _unpack("replies", reply.content), strict=True)]
        for message, answer in zip(share, answers, strict=True):
            self._ready[message.metadata.message_id] = answer

    def _note_partition(self, reply: Message) -> None:
        if reply.has_content() and "partition" in reply.content.config_records:
            said = reply.content.config_records.pop("partition")
            self._partition[reply.metadata.src_node_id] = int(str(said["id"]))


def unbundling(app: ClientApp, together: Callable[[], Together]) -> ClientApp:
    """A ClientApp that answers bundles too.

    Args:
        app: Answers a single message.
        together: What answers many, of this process.
    """
    outer = ClientApp()

    @outer.query()
    def query(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if reply.has_content():
            reply.content["partition"] = ConfigRecord({"id": int(context.node_config["partition-id"])})
        return reply

    outer.query("offer")(app)

    def turns(message: Message, context: Context) -> Message:
        if "clients" not in message.content.config_records:
            return app(message, context)
        return _answer(together(), message, context)

    outer.train()(turns)
    outer.evaluate()(turns)
    return outer


def _answer(together: Together, bundle: Message, context: Context) -> Message:
    waiting: dict[str, tuple[Message, Context]] = {}
    for header, content in _unpack("clients", bundle.content):
        message = Message(metadata=copy.copy(bundle.metadata), content=content)  # type: ignore[call-overload]
        config = {**context.node_config, "partition-id": header["partition"]}
        mine = Context(run_id=context.run_id, node_id=header["node"], node_config=config, state=RecordDict(), run_config={})
        waiting[flower.stamp(message)] = flower.copy_message(message), mine
    replies: dict[str, Message] = dict.fromkeys(waiting)  # type: ignore[assignment]
    while waiting:
        for reply in together(iter(list(waiting.values()))):
            of = reply.metadata.reply_to_message_id
            message, _ = waiting.pop(of)
            lost = reply.has_error()
            replies[of] = declined(message, RuntimeError(str(reply.error.reason))) if lost else reply
    return Message(_pack("replies", [{} for _ in replies], [r.content for r in replies.values()]), reply_to=bundle)


def _shares(messages: Sequence[Message], workers: int) -> Iterator[list[Message]]:
    """As many like shares as workers, or a multiple, none too large; in order. No messages make no shares."""
    if not messages:
        return iter(())
    count = workers * math.ceil(len(messages) / (workers * LARGEST))
    edges = [round(k * len(messages) / count) for k in range(count + 1)]
    return (list(messages[a:b]) for a, b in zip(edges, edges[1:], strict=False) if b > a)


def _pack(name: str, headers: Sequence[dict[str, Any]], contents: Sequence[RecordDict]) -> RecordDict:
    out, known, said = RecordDict(), dict[int, str](), []
    for header, content in zip(headers, contents, strict=True):
        where = {}
        for key, record in content.items():
            if id(record) not in known:
                known[id(record)] = f"r{len(known)}"
                out[known[id(record)]] = record
            where[key] = known[id(record)]
        said.append({**header, "records": where})
    out[name] = ConfigRecord({"json": json.dumps(said)})
    return out


def _unpack(name: str, packed: RecordDict) -> Iterator[tuple[dict[str, Any], RecordDict]]:
    for header in json.loads(str(packed.config_records[name]["json"])):
        yield header, RecordDict({key: packed[where] for key, where in header["records"].items()})

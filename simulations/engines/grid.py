"""Flower's Grid in one process: virtual nodes run the same ClientApp on the same messages, without extra serialization.

A reply is computed when it is pulled, so a cohort of any size needs only the memory of one client or one client batch: the backbone is
shared, and the bridge aggregates each update before it pulls the next.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune.contracts import flower

Together = Callable[[Iterator[tuple[Message, Context]]], list[Message]]


class VirtualGrid(Grid):
    """Flower's Grid of `nodes` virtual clients. Node i + 1 holds partition i."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._run = Run.create_empty(run_id=1)
        flower.identify_process(run_id=1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._nodes + 1)


class InProcessGrid(VirtualGrid):
    """Runs all virtual clients in this process.

    Messages are copied before delivery, because clients pop from their records.

    Args:
        client_app: Answers one message.
        nodes: Number of clients.
        together: Answers a batch of waiting messages of one type (train, evaluate), including the first; None answers one at a time.
    """

    def __init__(self, client_app: ClientApp, nodes: int, together: Together | None = None) -> None:
        super().__init__(nodes)
        self._app, self._together = client_app, together
        self._contexts = {
            i + 1: Context(
                run_id=1, node_id=i + 1, node_config={"partition-id": i, "num-partitions": nodes}, state=RecordDict(), run_config={}
            )
            for i in range(nodes)
        }
        self._waiting: dict[str, Message] = {}
        self._ready: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(flower.stamp(message))
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for i in message_ids:
            if i not in self._ready and i in self._waiting:
                self._answer(i)
            if i in self._ready:
                replies.append(self._ready.pop(i))
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, first: str) -> None:
        """Compute the reply to the message `first`, and possibly to other waiting ones."""
        kind = self._waiting[first].metadata.message_type
        if self._together and kind in ("train", "evaluate"):
            after = itertools.dropwhile(lambda i: i != first, list(self._waiting))
            ids = (i for i in after if self._waiting[i].metadata.message_type == kind)
            replies = self._together((flower.copy_message(self._waiting[i]), self._context(i)) for i in ids)
        else:
            replies = [self._one(first)]
        for reply in replies:
            flower.stamp(reply)
            self._waiting.pop(reply.metadata.reply_to_message_id)
            self._ready[reply.metadata.reply_to_message_id] = reply

    def _one(self, i: str) -> Message:
        message = self._waiting[i]
        try:
            return self._app(flower.copy_message(message), self._context(i))
        except Exception as bad:  # no failure of one client may end the run
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"{type(bad).__name__}: {bad}"), reply_to=message)

    def _context(self, i: str) -> Context:
        return self._contexts[self._waiting[i].metadata.dst_node_id]

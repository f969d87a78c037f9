"""A node in a thread of the test process, and messages for it."""

import itertools
import threading
from collections.abc import Callable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune.errors import NetworkError
from fedtune.network.node import Node
from tests.network.waiting import wait_until

LARGE = 20 * 2**20  # bytes


NUMBERS = itertools.count()


def content(size: int = 12) -> RecordDict:
    """An array of `size` bytes and a unique number, because Flower's server stores equal parts only once."""
    array = Array(np.arange(size // 4, dtype=np.float32))
    return RecordDict({"c": ConfigRecord({"number": next(NUMBERS)}), "a": ArrayRecord({"w": array})})


def echo(message: Message, node_id: int) -> Message:
    return Message(message.content, reply_to=message)


class Running:
    """A node in a thread, and its log."""

    def __init__(self, server: str, answer: Callable[[Message, int], Message] = echo, **more: object) -> None:
        self.reports: list[str] = []
        self.failure: NetworkError | None = None
        usual = {"root_certificates": None, "key": None, "insecure": True, "max_retries": None}
        self.node = Node(server=server, answer=answer, report=self.reports.append, **(usual | more))  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.node.serve()
        except NetworkError as bad:
            self.failure = bad

    def stop(self) -> None:
        self.node.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    @property
    def id(self) -> int:
        wait_until(lambda: self.connections() > 0)
        return self.node._fleet.node_id

    def connections(self) -> int:
        return sum("connected to" in sentence for sentence in self.reports)

    def heard(self, part: str) -> bool:
        return any(part in sentence for sentence in self.reports)


Start = Callable[..., Running]

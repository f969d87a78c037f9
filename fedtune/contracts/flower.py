"""The only module that uses Flower internals (which have no stable API); `tests/contracts/test_flower.py` is its smoke test."""

import logging
import uuid
from collections import OrderedDict

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity


class Meter:
    """Counts the serialized bytes of message contents. A record that many contents share is serialized once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[object, int]] = {}  # holds the record, so that its id is not reused

    def __call__(self, content: RecordDict) -> int:
        return sum(self._size(name, record) for name, record in content.items())  # serialization concatenates the items

    def _size(self, name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
        key = name, id(record)
        if key not in self._known:
            self._known[key] = record, recorddict_to_proto(RecordDict({name: record})).ByteSize()
        return self._known[key][1]


def identify_process(run_id: int) -> None:
    """Give this process the identity of the server's task: Flower creates messages only with it."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, SUPERLINK_NODE_ID


def stamp(message: Message) -> str:
    """Give a message an id, as a SuperLink does."""
    message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
    return message.metadata.message_id


def copy_message(message: Message) -> Message:
    """A copy of a message with its own records. The arrays are shared, because they are never changed."""
    content = RecordDict()
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord):
            content[key] = ArrayRecord(OrderedDict(record))
        else:
            content[key] = ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else MetricRecord(dict(record))
    return Message(metadata=message.metadata, content=content)  # type: ignore[call-overload]


def quiet() -> None:
    """Silence Flower's progress lines: fedtune reports progress itself, and replies carry the cause of every failure."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)

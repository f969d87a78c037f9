"""Packs many small arrays into one: Flower sends each array of a record in two requests, and an adapter has hundreds of arrays.

A record's arrays are sent as one array of bytes, which Flower cuts into chunks of 5 MB. A record that several messages share is packed
and stored once. A small message is packed as a whole into one record: there a request costs more than its data. A peer answers
a packed message with a packed one and a plain message with a plain one, so that peers without packing keep working.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from google.protobuf.message import DecodeError

from fedtune.network import _flwr_client as flwr

KIND, NAME = "fedtune.packed", "packed"
WHOLE = "fedtune.whole"
_MIN_ARRAYS = 2  # up to this many arrays, packing saves nothing
_SMALL = 300_000  # bytes of arrays; up to this size a message is packed as a whole and stored once per client
_MAX_BYTES = 1_000_000_000  # bytes of a packed record; protobuf writes at most 2 GiB


def pack(message: Message, cache: dict[int, tuple[ArrayRecord, ArrayRecord]] | None = None) -> Message:
    """Return the message with its arrays packed.

    Args:
        message: Not changed.
        cache: Cache, filled here: id of a record → (record, packed record), so that messages keep sharing records.
    """
    if message.has_error():
        return message
    if _is_small(message.content):
        data = flwr.recorddict_to_proto(message.content).SerializeToString(deterministic=True)
        return flwr.make_message(metadata=message.metadata, content=RecordDict({WHOLE: ConfigRecord({NAME: data})}))
    cache = {} if cache is None else cache
    content = RecordDict()
    for name, record in message.content.items():
        content[name] = _packed(record, cache) if isinstance(record, ArrayRecord) else record
    return flwr.make_message(metadata=message.metadata, content=content)


def unpack(message: Message) -> Message:
    """Return the message as it was before `pack`.

    Raises:
        ValueError: A packed record is malformed.
    """
    if message.has_error() or not is_packed(message):
        return message
    if WHOLE in message.content:
        return flwr.make_message(metadata=message.metadata, content=_unpacked_content(message.content[WHOLE]))
    content = RecordDict()
    for name, record in message.content.items():
        content[name] = _unpacked(record) if isinstance(record, ArrayRecord) and _is_packed(record) else record
    return flwr.make_message(metadata=message.metadata, content=content)


def is_packed(message: Message) -> bool:
    """Whether any record of the message is packed."""
    if not message.has_content():
        return False
    return WHOLE in message.content or any(_is_packed(record) for record in message.content.array_records.values())


def _is_small(content: RecordDict) -> bool:
    arrays = content.array_records.values()
    return bool(arrays) and sum(len(array.data) for record in arrays for array in record.values()) <= _SMALL


def _unpacked_content(record: object) -> RecordDict:
    data = record.get(NAME) if isinstance(record, ConfigRecord) else None
    try:
        return flwr.recorddict_from_proto(flwr.RecordDictProto.FromString(data))  # type: ignore[arg-type]
    except (DecodeError, TypeError, ValueError, KeyError, AttributeError) as bad:
        raise ValueError(f"a packed message cannot be read: {bad}") from None


def _packed(record: ArrayRecord, cache: dict[int, tuple[ArrayRecord, ArrayRecord]]) -> ArrayRecord:
    if len(record) <= _MIN_ARRAYS or sum(len(array.data) for array in record.values()) > _MAX_BYTES:
        return record
    if id(record) not in cache:
        data = flwr.array_record_to_proto(record).SerializeToString(deterministic=True)
        cache[id(record)] = record, ArrayRecord({NAME: Array(dtype="uint8", shape=(len(data),), stype=KIND, data=data)})
    return cache[id(record)][1]


def _is_packed(record: ArrayRecord) -> bool:
    return len(record) == 1 and NAME in record and record[NAME].stype == KIND


def _unpacked(record: ArrayRecord) -> ArrayRecord:
    try:
        return flwr.array_record_from_proto(flwr.ArrayRecordProto.FromString(record[NAME].data))
    except (DecodeError, TypeError) as bad:
        raise ValueError(f"a packed record cannot be read: {bad}") from None

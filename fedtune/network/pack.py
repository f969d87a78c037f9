"""Many small tensors as one: Flower sends each array of a record in two requests of its own, and an adapter has hundreds of arrays.

A record's arrays travel as one array of bytes, which Flower cuts into chunks of 5 MB. A record that several messages share stays one, which
Flower stores once. All of a small message travels as one record: there a request costs more than what it carries. Whoever was sent
packed records answers with packed ones, so that peers that know nothing of this get what they sent.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from google.protobuf.message import DecodeError

from fedtune.network import _flwr_client as flwr

KIND, NAME = "fedtune.packed", "packed"
WHOLE = "fedtune.whole"
_FEW = 2  # arrays that are as quick as they are
_SMALL = 300_000  # bytes of arrays, up to which a message is worth storing once for each client
_MOST = 1_000_000_000  # bytes; protobuf writes no more than 2 GiB


def pack(message: Message, known: dict[int, tuple[ArrayRecord, ArrayRecord]] | None = None) -> Message:
    """The message with its arrays packed.

    Args:
        message: It stays as it is.
        known: Packed records by the id of the record, with that record: filled here, so that messages share what they shared.
    """
    if message.has_error():
        return message
    if _is_small(message.content):
        data = flwr.recorddict_to_proto(message.content).SerializeToString(deterministic=True)
        return flwr.make_message(metadata=message.metadata, content=RecordDict({WHOLE: ConfigRecord({NAME: data})}))
    known = {} if known is None else known
    content = RecordDict()
    for name, record in message.content.items():
        content[name] = _packed(record, known) if isinstance(record, ArrayRecord) else record
    return flwr.make_message(metadata=message.metadata, content=content)


def unpack(message: Message) -> Message:
    """The message as it was before it was packed.

    Raises:
        ValueError: A packed record cannot be read.
    """
    if message.has_error() or not is_packed(message):
        return message
    if WHOLE in message.content:
        return flwr.make_message(metadata=message.metadata, content=_opened(message.content[WHOLE]))
    content = RecordDict()
    for name, record in message.content.items():
        content[name] = _unpacked(record) if isinstance(record, ArrayRecord) and _is_packed(record) else record
    return flwr.make_message(metadata=message.metadata, content=content)


def is_packed(message: Message) -> bool:
    """Whether any of its records is packed."""
    if not message.has_content():
        return False
    return WHOLE in message.content or any(_is_packed(record) for record in message.content.array_records.values())


def _is_small(content: RecordDict) -> bool:
    arrays = content.array_records.values()
    return bool(arrays) and sum(len(array.data) for record in arrays for array in record.values()) <= _SMALL


def _opened(record: object) -> RecordDict:
    data = record.get(NAME) if isinstance(record, ConfigRecord) else None
    try:
        return flwr.recorddict_from_proto(flwr.RecordDictProto.FromString(data))  # type: ignore[arg-type]
    except (DecodeError, TypeError, ValueError, KeyError, AttributeError) as bad:
        raise ValueError(f"a packed message cannot be read: {bad}") from None


def _packed(record: ArrayRecord, known: dict[int, tuple[ArrayRecord, ArrayRecord]]) -> ArrayRecord:
    if len(record) <= _FEW or sum(len(array.data) for array in record.values()) > _MOST:
        return record
    if id(record) not in known:
        data = flwr.array_record_to_proto(record).SerializeToString(deterministic=True)
        known[id(record)] = record, ArrayRecord({NAME: Array(dtype="uint8", shape=(len(data),), stype=KIND, data=data)})
    return known[id(record)][1]


def _is_packed(record: ArrayRecord) -> bool:
    return len(record) == 1 and NAME in record and record[NAME].stype == KIND


def _unpacked(record: ArrayRecord) -> ArrayRecord:
    try:
        return flwr.array_record_from_proto(flwr.ArrayRecordProto.FromString(record[NAME].data))
    except (DecodeError, TypeError) as bad:
        raise ValueError(f"a packed record cannot be read: {bad}") from None

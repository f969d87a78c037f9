"""Frames between a node and its worker: MAGIC, one byte that says what it is, eight of length (big endian), then that many bytes.

A stream that is cut, or holds anything else, is an error at once and never a wait for bytes that will not come.
"""

import struct
from enum import IntEnum
from typing import BinaryIO

MAGIC = b"ft1:"
LARGEST = 2**31 - 1  # bytes: what protobuf can parse
_HEAD = struct.Struct(">4sBQ")


class Kind(IntEnum):
    """What a frame holds."""

    SETTINGS = 1  # node → worker, once: a JSON object
    MESSAGE = 2  # either way: a Flower Message in protobuf
    READY = 3  # worker → node, once: nothing
    FAILED = 4  # worker → node: why it ends, as UTF-8


class FrameError(Exception):
    """The stream holds no frame where one must be."""


class CutFrame(FrameError):
    """The stream ended within a frame: whoever wrote it is gone."""


def write_frame(stream: BinaryIO, kind: Kind, payload: bytes) -> None:
    """Write one frame and flush.

    Raises:
        FrameError: The payload is larger than protobuf can read; nothing was written.
        OSError: The other side is gone.
    """
    if len(payload) > LARGEST:
        raise FrameError(f"{len(payload)} bytes do not fit into one frame, which holds {LARGEST}: send a smaller adapter")
    stream.write(_HEAD.pack(MAGIC, kind, len(payload)))
    stream.write(payload)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[Kind, bytes] | None:
    """The next frame, or None where the stream ended in order.

    Raises:
        FrameError: The stream was cut within a frame, or this is none.
    """
    head = stream.read(_HEAD.size)
    if not head:
        return None
    if len(head) < _HEAD.size:
        raise CutFrame(f"the stream was cut within a frame's head, after {len(head)} of {_HEAD.size} bytes")
    magic, kind, size = _HEAD.unpack(head)
    if magic != MAGIC or kind not in Kind.__members__.values():
        raise FrameError(f"no frame begins with {head!r}: something else writes to this pipe")
    if size > LARGEST:
        raise FrameError(f"a frame says that it has {size} bytes, more than the {LARGEST} that one may hold")
    payload = stream.read(size)
    if len(payload) < size:
        raise CutFrame(f"the stream was cut within a frame, after {len(payload)} of {size} bytes")
    return Kind(kind), payload

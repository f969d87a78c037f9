"""Frames between a node and its worker: MAGIC, 1 byte of kind, 8 bytes of length (big endian), then the payload.

A truncated or invalid stream raises an error at once; a reader never waits for bytes that will not come.
"""

import struct
from enum import IntEnum
from typing import BinaryIO

MAGIC = b"ft1:"
LARGEST = 2**31 - 1  # bytes: what protobuf can parse
_HEAD = struct.Struct(">4sBQ")


class Kind(IntEnum):
    """The kind of a frame's payload."""

    SETTINGS = 1  # node → worker, once: a JSON object
    MESSAGE = 2  # either way: a Flower Message in protobuf
    READY = 3  # worker → node, once: nothing
    FAILED = 4  # worker → node: why it ends, as UTF-8


class FrameError(Exception):
    """The stream does not hold a frame where one is expected."""


class CutFrame(FrameError):
    """The stream ended within a frame: the writer is gone."""


def write_frame(stream: BinaryIO, kind: Kind, payload: bytes) -> None:
    """Write one frame and flush.

    Raises:
        FrameError: The payload is larger than protobuf can parse; nothing was written.
        OSError: The other side is gone.
    """
    if len(payload) > LARGEST:
        raise FrameError(f"a payload of {len(payload)} bytes does not fit in one frame of at most {LARGEST}: send a smaller adapter")
    stream.write(_HEAD.pack(MAGIC, kind, len(payload)))
    stream.write(payload)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[Kind, bytes] | None:
    """Return the next frame, or None if the stream ended between frames.

    Raises:
        FrameError: The stream was cut within a frame, or holds something else.
    """
    head = stream.read(_HEAD.size)
    if not head:
        return None
    if len(head) < _HEAD.size:
        raise CutFrame(f"the stream was cut within a frame's head, after {len(head)} of {_HEAD.size} bytes")
    magic, kind, size = _HEAD.unpack(head)
    if magic != MAGIC or kind not in Kind.__members__.values():
        raise FrameError(f"{head!r} is not the head of a frame: something else writes to this pipe")
    if size > LARGEST:
        raise FrameError(f"a frame declares {size} bytes; the limit is {LARGEST}")
    payload = stream.read(size)
    if len(payload) < size:
        raise CutFrame(f"the stream was cut within a frame, after {len(payload)} of {size} bytes")
    return Kind(kind), payload

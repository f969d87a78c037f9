"""The process that holds the model: answers messages from its standard input until that closes.

    python -m fedtune.network.worker

It is started and watched by `fedtune.network.executor` and may die at any time. What libraries print goes to standard error: frames have a
descriptor of their own, so that a stray print cannot break them. A worker never outlives its node.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.network._flwr_client import ErrorCode, MessageProto, TaskIdentity, message_from_proto, message_to_proto
from fedtune.network.frames import FrameError, Kind, read_frame, write_frame
from fedtune.storage.parsing import parse_json

NODE_CONFIG = {"partition-id": 0, "num-partitions": 1}  # a device holds its own data, not a part of somebody's
_PR_SET_PDEATHSIG = 1


def main(make_app: Callable[[Mapping[str, Any]], ClientApp] | None = None) -> None:
    """Build the ClientApp from the first frame's settings and answer frames until the input closes.

    Args:
        make_app: Settings → ClientApp; None takes fedtune's own.
    """
    parent = os.getppid()
    requests, replies = _take_pipes()
    _die_with_parent(parent)
    try:
        settings = _settings(requests)
        if make_app is None:
            from fedtune.clients.deployed import make_app  # here, because it loads torch
        app = make_app(settings)
        write_frame(replies, Kind.READY, b"")
        _answer(app, requests, replies)
    except Exception as bad:
        traceback.print_exc()
        with suppress(OSError):
            write_frame(replies, Kind.FAILED, _words(bad).encode())
        sys.exit(1)


def answered(app: ClientApp, message: Message) -> Message:
    """The app's reply; an exception becomes an error reply, whatever it is, so that one turn never ends the client."""
    about = message.metadata
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = about.run_id, about.dst_task_id or 1, about.dst_node_id
    context = Context(run_id=about.run_id, node_id=about.dst_node_id, node_config=dict(NODE_CONFIG), state=RecordDict(), run_config={})
    try:
        return app(message, context)
    except Exception as bad:
        traceback.print_exc()
        return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=_words(bad)), reply_to=message)


def _answer(app: ClientApp, requests: BinaryIO, replies: BinaryIO) -> None:
    while (frame := read_frame(requests)) is not None:
        kind, payload = frame
        if kind is not Kind.MESSAGE:
            raise FrameError(f"a worker that runs takes messages, and this is {kind.name}")
        message = message_from_proto(MessageProto.FromString(payload))
        del frame, payload  # before the turn, which needs the memory
        reply = answered(app, message)
        try:
            write_frame(replies, Kind.MESSAGE, message_to_proto(reply).SerializeToString())
        except (FrameError, ValueError) as bad:  # too large: for us, or for protobuf
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"the reply cannot be sent: {bad}"), reply_to=message)
            write_frame(replies, Kind.MESSAGE, message_to_proto(reply).SerializeToString())


def _settings(requests: BinaryIO) -> Mapping[str, Any]:
    frame = read_frame(requests)
    if frame is None:
        sys.exit(0)  # the node is gone again
    kind, payload = frame
    if kind is not Kind.SETTINGS:
        raise FrameError(f"a worker's first frame must hold its settings, and this is {kind.name}")
    return parse_json(payload)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output as private streams; what anybody else prints goes to standard error, who reads gets nothing."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    for stream in (requests, replies):  # a forked helper that outlives this process must not keep the node waiting
        os.register_at_fork(after_in_child=partial(os.close, stream.fileno()))
    return requests, replies


def _die_with_parent(parent: int) -> None:
    """Ask Linux to end this process with the thread that started it; elsewhere the closed input does, once a turn is over."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked
        sys.exit(1)


def _words(bad: Exception) -> str:
    return f"{type(bad).__name__}: {bad}"


if __name__ == "__main__":
    main()

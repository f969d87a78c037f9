"""The worker process: holds the model and answers messages from its standard input until that closes.

    python -m fedtune.network.worker

`fedtune.network.executor` starts and monitors it; it may die at any time. Frames use a separate file descriptor, and prints of libraries
go to standard error, so that a stray print cannot break a frame. A worker never outlives its node.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.network._flwr_worker import ErrorCode, MessageProto, TaskIdentity, message_from_proto, message_to_proto
from fedtune.network.frames import FrameError, Kind, read_frame, write_frame
from fedtune.storage.heap import give_back
from fedtune.storage.parent import exit_with_parent
from fedtune.storage.parsing import parse_json

NODE_CONFIG = {"partition-id": 0, "num-partitions": 1}  # a device holds all of its own data


def main(make_app: Callable[[Mapping[str, Any]], ClientApp] | None = None) -> None:
    """Build the ClientApp from the first frame's settings and answer frames until the input closes.

    Args:
        make_app: Settings → ClientApp; None uses fedtune's own.
    """
    parent = os.getppid()
    requests, replies = _take_pipes()
    exit_with_parent(parent)
    try:
        settings = _settings(requests)
        if make_app is None:
            from fedtune.delivery.device import make_app  # here, because it loads torch
        app = make_app(settings)
        write_frame(replies, Kind.READY, b"")
        _answer(app, requests, replies)
    except Exception as bad:
        traceback.print_exc()
        with suppress(OSError):
            write_frame(replies, Kind.FAILED, _describe(bad).encode())
        sys.exit(1)


def answer_message(app: ClientApp, message: Message) -> Message:
    """Return the app's reply; any exception becomes an error reply, so that one turn never ends the client."""
    about = message.metadata
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = about.run_id, about.dst_task_id or 1, about.dst_node_id
    context = Context(run_id=about.run_id, node_id=about.dst_node_id, node_config=dict(NODE_CONFIG), state=RecordDict(), run_config={})
    try:
        return app(message, context)
    except Exception as bad:
        traceback.print_exc()
        return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=_describe(bad)), reply_to=message)


def _answer(app: ClientApp, requests: BinaryIO, replies: BinaryIO) -> None:
    while (frame := read_frame(requests)) is not None:
        kind, payload = frame
        if kind is not Kind.MESSAGE:
            raise FrameError(f"a running worker expects a MESSAGE frame, not {kind.name}")
        message = message_from_proto(MessageProto.FromString(payload))
        del frame, payload  # free the memory for the turn
        reply = answer_message(app, message)
        try:
            write_frame(replies, Kind.MESSAGE, message_to_proto(reply).SerializeToString())
        except (FrameError, ValueError) as bad:  # too large for a frame or for protobuf
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"the reply cannot be sent: {bad}"), reply_to=message)
            write_frame(replies, Kind.MESSAGE, message_to_proto(reply).SerializeToString())
        del message, reply
        give_back()  # the device's other programs have the memory until the next message


def _settings(requests: BinaryIO) -> Mapping[str, Any]:
    frame = read_frame(requests)
    if frame is None:
        sys.exit(0)  # the node has ended
    kind, payload = frame
    if kind is not Kind.SETTINGS:
        raise FrameError(f"a worker expects a SETTINGS frame first, not {kind.name}")
    return parse_json(payload)


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return private copies of standard input and output. Other prints go to standard error; other reads get an empty input."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    for stream in (requests, replies):  # a forked child that outlives this process must not keep the pipes open
        os.register_at_fork(after_in_child=partial(os.close, stream.fileno()))
    return requests, replies


def _describe(bad: Exception) -> str:
    return f"{type(bad).__name__}: {bad}"


if __name__ == "__main__":
    main()

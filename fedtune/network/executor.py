"""A child process that answers messages, so that a crash does not end the client.

The model stays loaded between rounds. A child that dies is replaced: the new one receives the last hello, which carries the experiment's
config, and then the message again. A message that kills two children is answered with an error.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from flwr.app import Error, Message

from fedtune.network._flwr_worker import ErrorCode, MessageProto, message_from_proto, message_to_proto
from fedtune.network.frames import CutFrame, FrameError, Kind, read_frame, write_frame
from fedtune.storage.parent import child_environment

WORKER = (sys.executable, "-P", "-m", "fedtune.network.worker")
MAX_CHILDREN = 2  # that one message may kill
HELLO = "query"


class ChildDied(Exception):
    """The child can no longer answer; the text is the reason."""


class Executor:
    """Answers messages in a child process, one at a time. The first message starts the child.

    Call `answer` from one long-lived thread: Linux ends the child with the thread that started it.

    Args:
        settings: The worker's settings (data path, device profile, client id, state folder): a JSON object.
        log: File to which the worker's standard error is appended.

    Other arguments:
        command: Command line of the worker.
    """

    def __init__(self, settings: Mapping[str, Any], log: Path, *, command: Sequence[str] = WORKER) -> None:
        self._settings, self._log, self._command = json.dumps(dict(settings)).encode(), log, tuple(command)
        self._child: _Child | None = None
        self._hello: bytes | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # over `_child`: stop() comes from another thread

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        child = self._child
        return child.pid if child else None

    def answer(self, message: Message, node_id: int) -> Message:
        """Return the child's reply, or an error reply if the message killed two children."""
        if message.metadata.dst_node_id != node_id:
            return _error(message, "the message is addressed to another node: the server mixes up its clients")
        try:
            payload = message_to_proto(message).SerializeToString()
        except ValueError as bad:  # protobuf writes no more than 2 GiB
            return _error(message, f"the message is too large for the worker: {bad}")
        why = ""
        for _ in range(MAX_CHILDREN):
            if self._stopped.is_set():
                return _error(message, "the client was stopped")
            try:
                reply = self._ready_for(payload).ask(payload, message.metadata.message_id)
            except ChildDied as bad:
                why = str(bad)
                self._end()
            except FrameError as bad:
                return _error(message, f"the message is too large for the worker: {bad}")
            else:
                if message.metadata.message_type in (HELLO, f"{HELLO}.default") and not reply.has_error():
                    self._hello = payload
                return reply
        if self._stopped.is_set():
            return _error(message, "the client was stopped")
        return _error(message, f"the client's worker died {MAX_CHILDREN} times on this message: {why} (its log is {self._log.name})")

    def stop(self) -> None:
        """End the child at once; a message in progress gets an error reply."""
        self._stopped.set()
        self._end()

    def _ready_for(self, payload: bytes) -> "_Child":
        """Return the running child, or start one and replay the last hello."""
        with self._lock:
            if self._child is not None and not self._child.dead:
                return self._child
            if self._stopped.is_set():
                raise ChildDied("the client was stopped")
            child = self._child = _Child(self._command, self._log)
        child.configure(self._settings)
        if self._hello is not None and self._hello != payload:
            child.ask(self._hello, None)
        return child

    def _end(self) -> None:
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    """One worker process."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=child_environment(),
                    process_group=0,  # a Ctrl-C in the terminal is the node's to handle
                )
            except OSError as bad:
                raise ChildDied(f"it cannot be started: {bad}") from None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def dead(self) -> bool:
        return self._process.poll() is not None

    @property
    def _requests(self) -> BinaryIO:
        assert self._process.stdin is not None
        return self._process.stdin  # type: ignore[return-value]  # Popen says IO[bytes]

    @property
    def _replies(self) -> BinaryIO:
        assert self._process.stdout is not None
        return self._process.stdout  # type: ignore[return-value]

    def configure(self, settings: bytes) -> None:
        """Send the settings and wait until the app is built."""
        self._write(Kind.SETTINGS, settings)
        self._read(Kind.READY)

    def ask(self, payload: bytes, message_id: str | None) -> Message:
        """Return the reply to a message; with a `message_id`, check that the reply belongs to it."""
        self._write(Kind.MESSAGE, payload)
        try:
            reply = message_from_proto(MessageProto.FromString(self._read(Kind.MESSAGE)))
        except ChildDied:
            raise
        except Exception as bad:  # protobuf and Flower raise many things
            raise ChildDied(f"its reply cannot be read: {type(bad).__name__}: {bad}") from None
        if message_id is not None and reply.metadata.reply_to_message_id != message_id:
            raise ChildDied("it answered another message")
        return reply

    def end(self) -> None:
        """Terminate the process, then kill it; takes at most two seconds."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)  # with its own children
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError, ValueError):  # another thread was writing
                pipe.close()  # type: ignore[union-attr]

    def _write(self, kind: Kind, payload: bytes) -> None:
        try:
            write_frame(self._requests, kind, payload)
        except (OSError, ValueError):  # the child closed its end of the pipe, or stop() closed ours
            self._read(kind)  # raises the reason that the child sent, or its exit
            raise ChildDied(self._exit_reason()) from None

    def _read(self, wanted: Kind) -> bytes:
        try:
            frame = read_frame(self._replies)
        except (CutFrame, OSError, ValueError):  # ValueError: stop() has closed the pipe
            frame = None
        except FrameError as bad:
            raise ChildDied(f"its answer is not a frame: {bad}") from None
        if frame is None:
            raise ChildDied(self._exit_reason())
        kind, payload = frame
        if kind is Kind.FAILED:
            raise ChildDied(payload.decode(errors="replace"))
        if kind is not wanted:
            raise ChildDied(f"it sent {kind.name} instead of {wanted.name}")
        return payload

    def _has_exited(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)  # its pipe closes shortly before the process ends
        return self.dead

    def _exit_reason(self) -> str:
        if not self._has_exited():
            return "it closed its pipe but still runs"
        code = self._process.returncode
        if code >= 0:
            return f"it ended with exit code {code}"
        return f"it was killed by signal {-code}" + (", perhaps out of memory" if -code == signal.SIGKILL else "")


def _error(message: Message, reason: str) -> Message:
    return Message(Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=reason), reply_to=message)

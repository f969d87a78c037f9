"""Renders chat templates like transformers, with limits on time and memory.

One process renders for the whole life of this one. Several chats go to it at once, so that a data set's conversations take little longer
than in this process.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import ModelError
from fedtune.storage.parsing import parse_json
from fedtune.templates import process

FAULT = "the model's chat template failed: "


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What a template renders.

    Args:
        messages: {"role", "content", ...}.
        tools: JSON schemas of functions; None if there are none.
        generate: Whether the start of an answer follows.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    generate: bool = True


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """What a template makes of a chat.

    Args:
        text: The rendering; "" if there is none.
        marks: Character ranges [start, end) of `{% generation %}`.
        refused: The template's own reason to refuse the messages (`raise_exception`), or "".
        fault: Why the template fails, or "".
    """

    text: str = ""
    marks: Sequence[tuple[int, int]] = ()
    refused: str = ""
    fault: str = ""


def render(template: str, chats: Sequence[Chat], names: Mapping[str, str], *, now: str | None = None) -> list[Rendered]:
    """Render each chat with a Jinja template.

    Args:
        template: The template's source.
        chats: The chats; the limits hold for each of them.
        names: Special tokens available to the template.
        now: Date and time of `strftime_now` in ISO 8601; None is the present.

    Raises:
        ModelError: A rendering took more than its time, or the rendering process ended.
    """
    variables = [{"messages": [dict(m) for m in c.messages], "tools": c.tools, "add_generation_prompt": c.generate} for c in chats]
    request = {"template": template, "names": dict(names), "chats": variables, "now": now, "seconds": process.SECONDS}
    return [Rendered(**found) for found in _PROCESS.ask(request)]


class _Process:
    """The rendering process. It starts on the first request, restarts after it has ended, and is separate after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the answer of `process.main`. Raises ModelError if the process ends without one."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            running = self._running()
            try:
                answer = self._exchange(running, line)
            except BaseException:  # an unread answer must not be taken for the next request's
                self._stop()
                raise
            if answer.endswith(b"\n"):
                return parse_json(answer)
            code = self._stop()
        bounds = {signal.SIGPROF: request["seconds"], signal.SIGALRM: process.PATIENCE_S}
        if -code in bounds:
            raise ModelError(f"{FAULT}it takes more than {bounds[signal.Signals(-code)]:g} s")
        raise ModelError(f"{FAULT}its rendering process ended with status {code}: see stderr")

    @staticmethod
    def _exchange(running: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert running.stdin is not None and running.stdout is not None
        try:
            running.stdin.write(line)
            running.stdin.flush()
        except BrokenPipeError:
            return b""
        return running.stdout.readline()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(process.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # the caller handles Ctrl-C
            )
        return self._process

    def _stop(self) -> int:
        ended, self._process = self._process, None
        assert ended is not None
        if ended.stdin is not None and ended.stdout is not None:
            ended.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                ended.stdin.close()
        try:
            return ended.wait(1)
        except subprocess.TimeoutExpired:
            ended.kill()
            return ended.wait()

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._stop()


_PROCESS = _Process()
atexit.register(_PROCESS.close)

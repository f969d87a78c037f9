"""Renders chat templates like transformers, with limits on time and memory."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine import template_process
from fedtune.storage.parsing import parse_json

_FAULT = "the model's chat template failed: "


def render(template: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Render messages {"role", "content"} with a Jinja template, up to the start of the answer.

    Args:
        names: Special tokens available to the template.

    Raises:
        ModelError: The template fails, or takes too much time or memory.
        ConfigError: The template refuses the messages.
    """
    chat = {"messages": [dict(m) for m in messages], "tools": None, "documents": None, "add_generation_prompt": True}
    answer = _PROCESS.ask({"template": template, "variables": {**names, **chat}, "seconds": template_process.SECONDS})
    if "refused" in answer:
        raise ConfigError(f"the model's chat template refuses the messages: {answer['refused']}")
    if "fault" in answer:
        raise ModelError(_FAULT + answer["fault"])
    return answer["text"]


class _Process:
    """The rendering process. It starts on the first request, restarts after it has ended, and is separate after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Return the answer of `template_process.main`; a fault if the process ends without one."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._running()
            try:
                answer = self._exchange(process, line)
            except BaseException:  # an unread answer must not be taken for the next request's
                self._stop()
                raise
            if answer.endswith(b"\n"):
                return parse_json(answer)
            code = self._stop()
        bounds = {signal.SIGPROF: request["seconds"], signal.SIGALRM: template_process.PATIENCE_S}
        if -code in bounds:
            return {"fault": f"it takes more than {bounds[signal.Signals(-code)]:g} s"}
        return {"fault": f"its rendering process ended with status {code}: see stderr"}

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return process.stdout.readline()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(template_process.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # the caller handles Ctrl-C
            )
        return self._process

    def _stop(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        if process.stdin is not None and process.stdout is not None:
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            return process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._stop()


_PROCESS = _Process()
atexit.register(_PROCESS.close)

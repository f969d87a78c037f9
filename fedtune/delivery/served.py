"""A child process that serves one version of the model."""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.inference.serve.handover import NO_TEXT
from fedtune.inference.serve.limits import Limits
from fedtune.storage.parent import child_environment
from fedtune.storage.parsing import parse_json

SERVER = (sys.executable, "-P", "-m", "fedtune.inference.serve.handover")
READY = "ready "
MARGIN_S = 30.0  # beyond the longest request


class Child:
    """One process of `fedtune.inference.serve.handover`. Linux ends it with the thread that started it.

    Args:
        name: The version.
        model: Its model folder.
        listener: File descriptor of the listening socket.
        log: File to which the child's standard error is appended.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self, name: str, model: Path, listener: int, log: Path) -> None:
        self.name = name
        self._heard, self._ready_at, self._leave_by = b"", 0.0, math.inf
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [*SERVER, str(listener), str(model.absolute()), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=child_environment(),
                pass_fds=(listener,),
                process_group=0,  # a Ctrl-C in the terminal is the client's to handle
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._output.fileno(), False)

    @property
    def exit_code(self) -> int | None:
        """None while the process runs; minus the signal that killed it."""
        return self._process.poll()

    @property
    def ready(self) -> bool:
        """Whether it has begun to accept connections and still runs."""
        if self.exit_code is None and not self._ready_at and self._line().startswith(READY):
            self._ready_at = time.monotonic()
        return self.exit_code is None and self._ready_at > 0

    @property
    def age(self) -> float:
        """Seconds since it was ready."""
        return time.monotonic() - self._ready_at

    @property
    def overdue(self) -> bool:
        """Whether it should have left by now."""
        return time.monotonic() > self._leave_by

    @property
    def description(self) -> str:
        ready: dict[str, Any] = parse_json(self._line().removeprefix(READY))
        return ready["description"]

    @property
    def failure(self) -> str:
        """Why it cannot serve, as it has printed; "" if it has printed no reason."""
        line = self._line()
        return "" if line.startswith(READY) else line

    @property
    def generates_no_text(self) -> bool:
        return self.exit_code == NO_TEXT

    @property
    def end(self) -> str:
        """How it ended, as a predicate."""
        code = self.exit_code
        if code is not None and code < 0:
            return f"was killed by signal {-code}" + (", perhaps out of memory," if -code == signal.SIGKILL else "")
        return f"ended with exit code {code}"

    def leave(self) -> None:
        """Let it answer what it has accepted, and end."""
        self._leave_by = time.monotonic() + Limits().timeout + MARGIN_S
        with suppress(OSError):
            self._input.write(b"\n")
            self._input.close()

    def terminate(self) -> None:
        """Let it answer what it has accepted within its grace time; new requests get 503."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, if it still runs, and close its pipes."""
        self._line()
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self._output):
            with suppress(OSError):
                pipe.close()

    def _line(self) -> str:
        """The line that it has printed; "" before that."""
        with suppress(ValueError, BlockingIOError):  # ValueError: closed
            while part := os.read(self._output.fileno(), 65536):
                self._heard += part
        line, end, _ = self._heard.partition(b"\n")
        return line.decode("utf-8", "replace") if end else ""

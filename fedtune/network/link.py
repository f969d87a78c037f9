"""The main process's handle on the SuperLink: starts the child process, restarts it after a crash, and opens Flower runs on it."""

import contextlib
import dataclasses
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import LinkLost, NetworkError
from fedtune.network.grid import LinkGrid
from fedtune.network.superlink import ProcessSettings
from fedtune.storage.parent import child_environment
from fedtune.storage.parsing import parse_json

_START_S, _ANSWER_S, _STOP_S = 120.0, 60.0, 5.0
_MAX_CRASHES, _CRASH_WINDOW_S = 5, 60.0  # after this many crashes within this time, give up

_log = logging.getLogger("fedtune.link")


@dataclass(frozen=True, kw_only=True)
class LinkSettings:
    """Addresses, allowed clients and files of the SuperLink.

    Args:
        folder: Folder of its database; created with mode 0700.
        host: Public address to listen on.
        port: Public port; 0 selects a free one.
        certificates: Files of the CA, the server's certificate and its key (PEM); None only with `insecure`.
        insecure: Use plain HTTP without node keys: anybody may register.
        allowed_keys: Client name → public key (OpenSSH or PEM text).
        allowed_file: File of `allowed_keys`, reread when it changes; None if they never change.
        max_body_mb: Largest body of an HTTP request; Flower cuts tensors into chunks of 5 MB.
        log: Log file (JSON lines); None writes `superlink.jsonl` into the folder.
    """

    folder: Path
    host: str
    port: int
    certificates: tuple[Path, Path, Path] | None
    insecure: bool
    allowed_keys: Mapping[str, str] = field(default_factory=dict)
    allowed_file: Path | None = None
    max_body_mb: float = 64.0
    log: Path | None = None

    @property
    def log_file(self) -> Path:
        return self.log or self.folder / "superlink.jsonl"


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """A node in the SuperLink's database; `last_seen` in seconds since 1970, 0 if it never connected."""

    node_id: int
    name: str
    online: bool
    last_seen: float


class _Child:
    """One SuperLink process."""

    def __init__(self, task: ProcessSettings) -> None:
        errors = Path(task.log).with_suffix(".err")
        try:
            errors.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with errors.open("wb") as stderr:
                errors.chmod(0o600)
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "fedtune.network.superlink"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env={**child_environment(), "FLWR_LOG_LEVEL": "WARNING"},
                    start_new_session=True,  # a Ctrl-C in the terminal reaches only the main process, which then stops the child
                )
        except OSError as bad:
            raise NetworkError(f"cannot start the SuperLink: {bad.strerror}: {errors}; free the disk or move the run directory") from None
        self._errors, self._lock, self._rest = errors, threading.Lock(), b""
        try:
            answer = self._request(task.to_line().encode(), _START_S)
        except ConnectionError:
            self.process.kill()
            self.process.wait()
            self.close_pipes()
            raise
        if "error" in answer:
            self.process.wait()
            self.close_pipes()
            raise NetworkError(answer["error"])
        self.port, self.private_port = int(answer["port"]), int(answer["private_port"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            NetworkError: The process answered with an error.
            ConnectionError: It has ended or is busy.
        """
        answer = self._request(json.dumps(request).encode() + b"\n", _ANSWER_S)
        if "error" in answer:
            raise NetworkError(answer["error"])
        if "busy" in answer:
            raise ConnectionError(answer["busy"])
        return answer

    def _request(self, line: bytes, patience_s: float) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with self._lock:
            try:
                self.process.stdin.write(line)
                self.process.stdin.flush()
                until = time.monotonic() + patience_s
                while b"\n" not in self._rest:
                    if not select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                        self.process.kill()  # its next answer would belong to this request, not to the next
                        raise ConnectionError(f"no answer within {patience_s:g} s")
                    part = os.read(self.process.stdout.fileno(), 1 << 16)
                    if not part:
                        raise ConnectionError(f"it ended; see {self._errors}")
                    self._rest += part
            except BrokenPipeError:
                raise ConnectionError(f"it ended; see {self._errors}") from None
            except (OSError, ValueError) as error:  # ValueError: the pipe is already closed
                raise ConnectionError(str(error)) from None
            answer, _, self._rest = self._rest.partition(b"\n")
        return parse_json(answer)

    def close_pipes(self) -> None:
        """Close the pipes of an ended child."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with self._lock:
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # unsent bytes remain
                self.process.stdin.close()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class SuperLink:
    """Flower's SuperLink as a child process. After a crash it is restarted on the same ports and database."""

    def __init__(self, settings: LinkSettings) -> None:
        if settings.certificates is None and not settings.insecure:
            raise NetworkError("the server has no certificates: make some with `fedtune keys`, or give --insecure")
        self._settings = settings
        self._port, self._private_port = settings.port, 0
        self._change = threading.Condition()
        self._child: _Child | None = None
        self._supervisor: threading.Thread | None = None
        self._failure: NetworkError | None = None
        self._stopping = False
        self._grid: LinkGrid | None = None

    def start(self) -> None:
        """Start the child and return when nodes can connect; return at once if it runs.

        Raises:
            NetworkError: It cannot start; the text is the reason.
        """
        with self._change:
            if self._supervisor is None or not self._supervisor.is_alive():
                self._failure, self._stopping = None, False
                # the kernel ends a child together with the thread that started it, so one long-lived thread starts them all
                self._supervisor = threading.Thread(target=self._supervise, name="superlink", daemon=True)
                self._supervisor.start()
        self.wait(_START_S)

    def wait(self, patience_s: float) -> None:
        """Return when the child runs.

        Raises:
            NetworkError: It was given up; the text is the reason. LinkLost: it did not start within `patience_s` seconds.
        """
        with self._change:
            self._change.wait_for(lambda: self.alive or self._failure is not None or self._stopping, patience_s)
            if self._failure is not None:
                raise type(self._failure)(str(self._failure))
            if not self.alive:
                raise LinkLost(f"the SuperLink did not come back within {patience_s:g} s: see {self._settings.log_file}")

    @property
    def alive(self) -> bool:
        child = self._child
        return child is not None and child.process.poll() is None

    @property
    def failure(self) -> NetworkError | None:
        """Why it was given up; None while it runs or restarts."""
        return self._failure

    @property
    def port(self) -> int:
        """The public port."""
        return self._port

    @property
    def private_address(self) -> str:
        """Address of Flower's complete API, on the loopback interface."""
        return f"127.0.0.1:{self._private_port}"

    def open_run(self, name: str, patience_s: float = 60.0) -> LinkGrid:
        """Return a connected Grid on a new Flower run; all older runs end.

        Raises:
            LinkLost: The SuperLink did not answer within `patience_s` seconds.
        """
        if self._grid is not None:
            self._grid.close()
        answer = self.ask(patience_s, do="open_run", name=name)
        self._grid = LinkGrid(self, answer["run_id"], answer["token"], patience_s)
        return self._grid

    def nodes(self) -> list[NodeInfo]:
        """All nodes that the SuperLink knows, sorted by name."""
        return sorted((NodeInfo(**node) for node in self.ask(60.0, do="nodes")["nodes"]), key=lambda n: (n.name, n.node_id))

    def allow(self, keys: Mapping[str, str]) -> None:
        """Replace the allowed clients (name → public key).

        Raises:
            NetworkError: A key is invalid; nothing has changed.
        """
        self.ask(_ANSWER_S, do="allow", keys=dict(keys))
        self._settings = dataclasses.replace(self._settings, allowed_keys=dict(keys))

    def ask(self, patience_s: float, **request: Any) -> dict[str, Any]:
        """Send a request to the child; if it has ended, wait for its restart and retry."""
        until = time.monotonic() + patience_s
        while True:
            self.wait(max(0.0, until - time.monotonic()))
            try:
                assert self._child is not None
                return self._child.ask(**request)
            except ConnectionError as error:
                if time.monotonic() > until:
                    raise LinkLost(f"the SuperLink does not answer: {error}") from None
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop the child; the database stays."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        if self._grid is not None:
            self._grid.close()
        if self._child is not None:
            self._child.stop()
        if self._supervisor is not None:
            self._supervisor.join(_START_S)

    def _process_settings(self) -> ProcessSettings:
        s = self._settings
        certificate, key = (str(s.certificates[1]), str(s.certificates[2])) if s.certificates and not s.insecure else (None, None)
        return ProcessSettings(
            folder=str(s.folder),
            log=str(s.log_file),
            host=s.host,
            port=self._port,
            private_port=self._private_port,
            certificate=certificate,
            certificate_key=key,
            allowed_keys=None if s.insecure else dict(s.allowed_keys),
            max_body=int(s.max_body_mb * 1e6),
            parent=os.getpid(),
        )

    def _supervise(self) -> None:
        """Start the child, and restart it when it ends unasked."""
        crashes: deque[float] = deque(maxlen=_MAX_CRASHES)
        try:
            while not self._stopping:
                child = _Child(self._process_settings())
                with self._change:
                    self._child, self._port, self._private_port = child, child.port, child.private_port
                    self._change.notify_all()
                if self._stopping:
                    child.stop()
                code = child.process.wait()
                child.close_pipes()
                if self._stopping:
                    return
                _log.warning("the SuperLink ended unexpectedly (exit code %s); restarting it", code)
                crashes.append(time.monotonic())
                if len(crashes) == _MAX_CRASHES and crashes[-1] - crashes[0] < _CRASH_WINDOW_S:
                    raise LinkLost(f"the SuperLink ended {_MAX_CRASHES} times within {_CRASH_WINDOW_S:g} s: see {self._settings.log_file}")
        except (NetworkError, ConnectionError) as bad:
            with self._change:
                self._failure = bad if isinstance(bad, NetworkError) else NetworkError(f"the SuperLink did not start: {bad}")
                self._change.notify_all()

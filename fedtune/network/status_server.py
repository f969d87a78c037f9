"""The status of a running server: `server.json` in the run directory, and the same over HTTP on the loopback interface."""

import http.server
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.storage.atomic import write_text

PATH = "/fedtune/status"
FILE = "server.json"
_EVERY_S = 1.0


class StatusServer:
    """Updates the status while the context is open.

    Args:
        file: Status file, written atomically every second.
        look: Returns the status as plain JSON; if it raises, the last status stays.
    """

    def __init__(self, file: Path, look: Callable[[], dict[str, Any]]) -> None:
        self._file, self._look = file, look
        self._over = threading.Event()
        self._last: dict[str, Any] = {}
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(lambda: self._last))
        self._http.daemon_threads = True
        self._threads = [
            threading.Thread(target=self._keep, name="status", daemon=True),
            threading.Thread(target=self._http.serve_forever, name="control", daemon=True),
        ]

    @property
    def control(self) -> str:
        """Host and port of the HTTP server."""
        return f"127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "StatusServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
        self._threads[0].join()
        self._write()

    def _keep(self) -> None:
        while not self._over.is_set():
            self._write()
            self._over.wait(_EVERY_S)

    def _write(self) -> None:
        try:
            self._last = {"pid": os.getpid(), "control": self.control, "at": time.time(), **self._look()}
            write_text(self._file, json.dumps(self._last), durable=False)
        except Exception:  # noqa: S110  a status that cannot be computed or written must not disturb a run
            return


def _handler(last: Callable[[], dict[str, Any]]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802  the library's name
            body = json.dumps(last()).encode() if self.path == PATH else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged."""

    return Handler

"""The process of `fedtune serve`: a socket, the engine's thread, and a graceful shutdown."""

import ipaddress
import socket
import threading
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fedtune.config.bounds import require
from fedtune.errors import NetworkError
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.serve.limits import StallTimeout

CLOSE_S = 5  # to send finished answers


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        NetworkError: The address is not available.
        ConfigError: The port is invalid.
    """
    require("port", port, ge=0, le=65535)  # 0 selects a free port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=512)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it: no response waits 40 ms for an ACK
        return listener
    except (OSError, UnicodeError) as bad:
        why = getattr(bad, "strerror", None) or bad
        raise NetworkError(f"cannot listen on {host}:{port}: {why}; give another --host or --port") from None


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C. Then accepted requests may finish within the grace time, new ones get 503, and `run` returns.

    A second signal stops the server at once.
    """

    def __init__(self, app: FastAPI, scheduler: Scheduler, *, grace: float, connections: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=StallTimeout,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=connections,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self._scheduler, self._grace = scheduler, grace
        self._until: float | None = None

    def serve_on(self, listener: socket.socket) -> None:
        """Serve a listening socket; returns after a signal or `stop`."""
        worker = threading.Thread(target=self._scheduler.run, name="engine", daemon=True)
        worker.start()
        try:
            self.run(sockets=[listener])
        finally:
            self._scheduler.close()
            worker.join()

    def stop(self) -> None:
        """Stop gracefully on the first call, at once on the second."""
        if self._until is None:
            self._until = time.monotonic() + self._grace
            self._scheduler.drain()
        else:
            self._scheduler.close()
            self.should_exit = self.force_exit = True

    def handle_exit(
        self, sig: int, frame: FrameType | None
    ) -> None:  # uvicorn's handler would raise the signal again, which ends the process
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None and (not any(self._scheduler.load) or time.monotonic() > self._until):
            self._scheduler.close()
            self.should_exit = True
        return await super().on_tick(counter)

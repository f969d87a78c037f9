"""The process behind `fedtune serve`: a socket, the engine's thread, and a stop that loses nothing."""

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

CLOSE_S = 5  # for answers that are ready to be read


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        NetworkError: The address cannot be had.
        ConfigError: The port is none.
    """
    require("port", port, ge=0, le=65535)  # 0 is any that is free
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=512)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it: no answer waits 40 ms for an ACK
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
    """Serves until SIGTERM or Ctrl-C; then what was taken may end within the grace, new requests get 503, and `run` returns.

    A second signal ends at once.
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
        """Answer requests that come to a listening socket; returns after a signal, or after `stop`."""
        worker = threading.Thread(target=self._scheduler.run, name="engine", daemon=True)
        worker.start()
        try:
            self.run(sockets=[listener])
        finally:
            self._scheduler.close()
            worker.join()

    def stop(self) -> None:
        """Stop, gracefully the first time."""
        if self._until is None:
            self._until = time.monotonic() + self._grace
            self._scheduler.drain()
        else:
            self._scheduler.close()
            self.should_exit = self.force_exit = True

    def handle_exit(
        self, sig: int, frame: FrameType | None
    ) -> None:  # uvicorn's own would send the signal again, and end the process by it
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None and (not any(self._scheduler.load) or time.monotonic() > self._until):
            self._scheduler.close()
            self.should_exit = True
        return await super().on_tick(counter)

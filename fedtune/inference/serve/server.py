"""The process of `fedtune serve`: a socket, the engine's thread, and a graceful shutdown. This module loads no torch."""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from fedtune.inference.serve.limits import StallTimeout

if TYPE_CHECKING:
    from fedtune.inference.engine.schedule import Scheduler

CLOSE_S = 5  # seconds to send finished answers
_CLOSE = (b"connection", b"close")


class HttpServer(uvicorn.Server):
    """Serves an ASGI application on a socket that other processes may serve too.

    Args:
        app: The application.
        connections: Most connections at once; further requests get 503.
        ready: Called when the server accepts connections.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], *, connections: int, ready: Callable[[], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                interface="asgi3",
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
        self._ready = ready
        self._leave_by: float | None = None
        self._leaving = False
        self.left = threading.Event()  # set when the server no longer accepts connections

    def leave(self, grace: float) -> None:
        """Stop accepting connections, answer the requests on the accepted ones, then stop. Other processes may go on serving the socket.

        A connection is closed after its next answer, or when it has been idle for uvicorn's usual time. If it were closed at once, a
        request on its way could be lost. Can be called from any thread.

        Args:
            grace: Seconds after which the server stops in any case.
        """
        self._leave_by = time.monotonic() + grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        if self._leave_by is None:
            return await super().on_tick(counter)
        if not self._leaving:
            self._stop_accepting()
        elif not self.left.is_set():  # one tick later: closing drops connections that asyncio has accepted but not yet set up
            for server in self.servers:
                server.close()
            self.left.set()
        elif not self.server_state.connections or time.monotonic() > self._leave_by:
            self._end()
        return await super().on_tick(0)  # 0 renews the default headers

    def _stop_accepting(self) -> None:
        """Leave new connections to other processes, and send `Connection: close` with the next answer on each accepted one.

        An answer whose headers are already sent cannot carry it. Its connection stays open for one more answer: closed without notice, it
        could lose a request that the client has sent meanwhile.
        """
        loop = asyncio.get_running_loop()
        for listener in (listener for server in self.servers for listener in server.sockets):
            loop.remove_reader(listener.fileno())
        self.config.encoded_headers.append(_CLOSE)
        for connection in self.server_state.connections:
            cycle: Any = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_started:
                cycle.default_headers = [*cycle.default_headers, _CLOSE]
        self._leaving = True

    def _end(self) -> None:
        self.should_exit = True


class Server(HttpServer):
    """Serves a model until SIGTERM or Ctrl-C. Then accepted requests may finish within the grace time, new ones get 503, and `run` returns.

    A second signal stops the server at once.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        scheduler: "Scheduler",
        *,
        grace: float,
        connections: int,
        ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(app, connections=connections, ready=ready)
        self._scheduler, self._grace = scheduler, grace
        self._until: float | None = None

    def serve_on(self, listener: socket.socket) -> None:
        """Serve a listening socket; returns after a signal, `stop` or `leave`."""
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
            self._end()
            self.force_exit = True

    def handle_exit(
        self, sig: int, frame: FrameType | None
    ) -> None:  # uvicorn's handler would raise the signal again, which ends the process
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None and (not any(self._scheduler.load) or time.monotonic() > self._until):
            self._end()
        return await super().on_tick(counter)

    def _end(self) -> None:
        self._scheduler.close()
        super()._end()

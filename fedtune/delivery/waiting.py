"""Answers every request with 503 and the reason, in OpenAI's format, while no model does."""

import asyncio
import json
import socket
import threading
from contextlib import suppress
from typing import Any

from fedtune.inference.serve.refusal import Refused
from fedtune.inference.serve.server import HttpServer

CONNECTIONS = 256
RETRY_S = 5
LEAVE_S = 5.0
BODY_S = 5.0  # to read a request's body: without that, a client may see a broken connection instead of the answer


class Waiting:
    """A thread that serves a listening socket, which children may serve too.

    Args:
        listener: The socket.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._why = listener, ""
        self._server: HttpServer | None = None
        self._thread: threading.Thread | None = None

    def begin(self, why: str) -> None:
        """Answer from now on, if it does not yet, with this reason."""
        self.change(why)
        if self._server is None:
            self._server = HttpServer(self._answer, connections=CONNECTIONS)
            self._thread = threading.Thread(target=self._server.run, args=([self._listener.dup()],), name="waiting", daemon=True)
            self._thread.start()

    def change(self, why: str) -> None:
        """Change the reason."""
        self._why = why

    def end(self) -> None:
        """Leave new connections to others; waits until none is accepted here."""
        if self._server is not None:
            self._server.leave(LEAVE_S)
            self._server.left.wait(LEAVE_S)
            self._server = None

    def close(self) -> None:
        """End, and wait until the socket is closed here."""
        self.end()
        if self._thread is not None:
            self._thread.join()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(BODY_S):
                while (await receive()).get("more_body"):
                    pass
        refusal = Refused(503, f"{self._why}: retry later", code="no_model", retry_after=RETRY_S)
        body = json.dumps(refusal.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close", **refusal.headers()}
        lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": refusal.status, "headers": lines})
        await send({"type": "http.response.body", "body": body})

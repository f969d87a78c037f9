"""The public port: fleet endpoints and health, nothing else; what is not welcome is refused before Flower sees it.

Flower serves Control, Fleet and Runtime by one application, and only Fleet asks who calls. So this port knows its paths by heart, checks
the caller's key before it reads the body, limits the body, and hangs up on whoever dawdles.
"""

import asyncio
import binascii
import logging
from base64 import b64decode
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from weakref import WeakValueDictionary

import h11
from cryptography.exceptions import UnsupportedAlgorithm
from google.protobuf.message import DecodeError
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedtune.network import _flwr
from fedtune.network.bodies import Bodies, Body
from fedtune.network.listener import Peer
from fedtune.network.lives import LIFE, Lives
from fedtune.network.pace import PACE, Pace

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/health"
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
ACTIVATE, DEACTIVATE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
OPEN = frozenset({("GET", HEALTH), ("HEAD", HEALTH)}) | {r for r in _flwr.PROTOBUF_REQUEST_TYPES if r[1].startswith("/v1/fleet/")}
PACE_S, PACE_BYTES = 20.0, 16 * 1024  # an unfinished request must bring this much in this time

_KEY = _flwr.FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
_log = logging.getLogger("fedtune.superlink")


class PublicPort:
    """An ASGI filter in front of Flower's application.

    Args:
        app: Flower's application.
        max_body: Largest body of a request, in bytes, and of all requests together that one key has under way.
        keys: Public keys (Flower's PEM bytes) that may call; None lets anybody in.
        takeover: Called with the public key of a node that comes (again), before Flower hears of it.
        idle: Called with the public key of a node of ours that asks for a message, likewise: it answers one after the other.
        welcome: Called with the address and port of a connection whose caller may call.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body: int,
        keys: Collection[bytes] | None,
        takeover: Callable[[bytes], None] = lambda _: None,
        idle: Callable[[bytes], None] = lambda _: None,
        welcome: Callable[[Peer], None] = lambda _: None,
    ) -> None:
        self._app, self._max_body, self._keys, self._lives, self._welcome = app, max_body, keys, Lives(), welcome
        self._calls = {ACTIVATE: takeover, PULL: idle}
        self._turns = WeakValueDictionary[bytes, asyncio.Lock]()
        self._pace, self._bodies = Pace(), Bodies(max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) not in OPEN:
            return await self._refuse(scope, send, 404, "no such path here")
        if scope["path"] == HEALTH:
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if self._keys is not None and (why := _stranger(headers, self._keys)):
            return await self._refuse(scope, send, 401, why)
        if client := scope.get("client"):
            self._welcome((str(client[0]), int(client[1])))
        if self._keys is not None and not self._may_speak(headers, scope["path"]):
            return await self._refuse(scope, send, 409, "another process has this key and its place")
        pace = self._pace.told(headers.get(_KEY, b""))

        async def paced(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), (PACE.encode(), f"{pace:.3f}".encode())]}
            await send(event)

        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_body:
            return await self._refuse(scope, send, 413, f"a body of {declared.decode('latin-1')} bytes, more than {self._max_body}")
        with self._bodies.of(headers.get(_KEY, b"")) as room:
            await self._hand_on(scope, receive, send, paced, room)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, paced: Send, room: Body) -> None:
        """Read a request's body and give it to Flower."""
        headers, body = dict(scope["headers"]), bytearray()
        while True:
            part = await receive()
            if part["type"] != "http.request":
                return None  # hung up in the middle: nobody is left to answer
            body += part.get("body", b"")
            if len(body) > self._max_body:
                return await self._refuse(scope, send, 413, f"a body of more than {self._max_body} bytes")
            if not room.grow(len(part.get("body", b""))):
                return await self._refuse(scope, send, 429, f"more than {self._max_body} bytes under way of one key")
            if not part.get("more_body", False):
                break
        if scope["path"] == PUSH and (why := _forged(bytes(body))):
            return await self._refuse(scope, send, 403, why)
        parts = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> MutableMapping[str, Any]:
            return next(parts, None) or await receive()

        call = self._calls.get(scope["path"])
        if scope["path"] == PULL and LIFE.encode() not in headers:
            call = None  # Flower's own SuperNode asks for the next message while it is at one
        if not call or _stranger(headers, None):
            return await self._app(scope, replay, paced)
        key = b64decode(headers[_KEY])
        async with self._turns.setdefault(key, asyncio.Lock()):  # a node that asks again may be ahead of its first request
            await asyncio.to_thread(call, key)
            return await self._app(scope, replay, paced)

    def _may_speak(self, headers: dict[bytes, bytes], path: str) -> bool:
        """Whether this is the one process that has the place of its key, which `_stranger` has checked."""
        life = headers.get(LIFE.encode(), b"").decode("latin-1")[:100]
        return self._lives.may_speak(headers[_KEY], life, activates=path == ACTIVATE, leaves=path == DEACTIVATE)

    async def _refuse(self, scope: Scope, send: Send, status: int, why: str) -> None:
        if scope["type"] != "http":
            return
        peer = (scope.get("client") or ("?", 0))[0]
        _log.warning("refused", extra={"peer": peer, "method": scope["method"], "path": scope["path"][:200], "status": status, "why": why})
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _stranger(headers: dict[bytes, bytes], keys: Collection[bytes] | None) -> str:
    """Why a caller is none of ours; "" where it holds an allowed key (of None: the one that it shows).

    That the signature is fresh, and the node its own, Flower checks.
    """
    try:
        key = b64decode(headers[_KEY], validate=True)
        signature = b64decode(headers[_flwr.FLEET_HTTP_SIGNATURE_HEADER.lower().encode()], validate=True)
        signed = headers[_flwr.TIMESTAMP_HEADER.lower().encode()]
    except KeyError:
        return "no node key"
    except (ValueError, binascii.Error):
        return "a node key that cannot be read"
    if keys is not None and key not in keys:
        return "a node key that is not on the list"
    try:
        good = _flwr.verify_signature(_flwr.bytes_to_public_key(key), signed, signature)
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm):  # no key, or one of another kind
        return "a node key that cannot be read"
    return "" if good else "a wrong signature"


def _forged(body: bytes) -> str:
    """Why a push must not count: Flower checks who calls, but not in whose name the message inside speaks."""
    request = _flwr.PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return ""  # Flower refuses it by name
    node = request.node.node_id
    others = {m.metadata.src_node_id for m in request.messages_list} - {node}
    return f"node {node} pushes in the name of node {min(others)}" if others else ""


class Impatient(H11Protocol):
    """HTTP that hangs up on an unfinished request that stands still: uvicorn itself waits for ever."""

    _timer: asyncio.TimerHandle | None = None
    _came = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        if self._timer is None:
            self._wait()
        super().data_received(data)
        if self._timer is not None and self.conn.their_state is h11.DONE:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._came = 0
        self._timer = self.loop.call_later(PACE_S, self._check)

    def _check(self) -> None:
        if self._came >= PACE_BYTES or self.conn.their_state is h11.DONE:
            return self._wait()
        self.transport.abort()

"""The public port: only the fleet endpoints and health. Other requests are refused before Flower sees them.

Flower serves the Control, Fleet and Runtime APIs in one application, of which only Fleet authenticates callers. So this port has a list of
allowed paths, checks the caller's key before it reads the body, limits the body, and closes slow connections.
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
from fedtune.network.body_budget import BodyBudget, BodyBytes
from fedtune.network.incarnations import INCARNATION_HEADER, Incarnations
from fedtune.network.listener import Peer
from fedtune.network.pace import PACE, PollPacer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/health"
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
ACTIVATE, DEACTIVATE = "/v1/fleet/activate-node", "/v1/fleet/deactivate-node"
ENDPOINTS = frozenset({("GET", HEALTH), ("HEAD", HEALTH)}) | {r for r in _flwr.PROTOBUF_REQUEST_TYPES if r[1].startswith("/v1/fleet/")}
PACE_S, PACE_BYTES = 20.0, 16 * 1024  # an unfinished request must send this many bytes in this time

_KEY = _flwr.FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
_log = logging.getLogger("fedtune.superlink")


class PublicPort:
    """An ASGI filter in front of Flower's application.

    Args:
        app: Flower's application.
        max_body: Largest body of a request, and of all unfinished requests of one key together, in bytes.
        keys: Allowed public keys (Flower's PEM bytes); None allows any.
        take_over: Called with a node's public key before Flower activates the node.
        redeliver_lost: Called with a node's public key before Flower handles its poll. Only for our nodes: they poll when they hold no
            message.
        authenticated: Called with the address and port of an authenticated connection.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body: int,
        keys: Collection[bytes] | None,
        take_over: Callable[[bytes], None] = lambda _: None,
        redeliver_lost: Callable[[bytes], None] = lambda _: None,
        authenticated: Callable[[Peer], None] = lambda _: None,
    ) -> None:
        self._app, self._max_body, self._keys, self._incarnations, self._authenticated = app, max_body, keys, Incarnations(), authenticated
        self._calls = {ACTIVATE: take_over, PULL: redeliver_lost}
        self._locks = WeakValueDictionary[bytes, asyncio.Lock]()
        self._pace, self._body_budget = PollPacer(), BodyBudget(max_body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) not in ENDPOINTS:
            return await self._refuse(scope, send, 404, "no such path")
        if scope["path"] == HEALTH:
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if self._keys is not None and (why := _credential_error(headers, self._keys)):
            return await self._refuse(scope, send, 401, why)
        if client := scope.get("client"):
            self._authenticated((str(client[0]), int(client[1])))
        if self._keys is not None and not self._is_active(headers, scope["path"]):
            return await self._refuse(scope, send, 409, "another process is active with this key")
        interval = self._pace.interval(headers.get(_KEY, b""))

        async def paced(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), (PACE.encode(), f"{interval:.3f}".encode())]}
            await send(event)

        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_body:
            return await self._refuse(scope, send, 413, f"a body of {declared.decode('latin-1')} bytes exceeds {self._max_body}")
        with self._body_budget.of(headers.get(_KEY, b"")) as budget:
            await self._forward(scope, receive, send, paced, budget)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, paced: Send, budget: BodyBytes) -> None:
        """Read a request's body and pass it to Flower."""
        headers, body = dict(scope["headers"]), bytearray()
        while True:
            part = await receive()
            if part["type"] != "http.request":
                return None  # the caller disconnected
            body += part.get("body", b"")
            if len(body) > self._max_body:
                return await self._refuse(scope, send, 413, f"the body exceeds {self._max_body} bytes")
            if not budget.grow(len(part.get("body", b""))):
                return await self._refuse(scope, send, 429, f"the unfinished requests of one key exceed {self._max_body} bytes")
            if not part.get("more_body", False):
                break
        if scope["path"] == PUSH and (why := _forgery_error(bytes(body))):
            return await self._refuse(scope, send, 403, why)
        parts = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> MutableMapping[str, Any]:
            return next(parts, None) or await receive()

        call = self._calls.get(scope["path"])
        if scope["path"] == PULL and INCARNATION_HEADER.encode() not in headers:
            call = None  # Flower's own SuperNode polls while it works on a message
        if not call or _credential_error(headers, None):
            return await self._app(scope, replay, paced)
        key = b64decode(headers[_KEY])
        async with self._locks.setdefault(key, asyncio.Lock()):  # a node's repeated request may overtake its first
            await asyncio.to_thread(call, key)
            return await self._app(scope, replay, paced)

    def _is_active(self, headers: dict[bytes, bytes], path: str) -> bool:
        """Whether the caller is the active process of its key, which `_credential_error` has verified."""
        incarnation = headers.get(INCARNATION_HEADER.encode(), b"").decode("latin-1")[:100]
        return self._incarnations.may_call(headers[_KEY], incarnation, activates=path == ACTIVATE, leaves=path == DEACTIVATE)

    async def _refuse(self, scope: Scope, send: Send, status: int, why: str) -> None:
        if scope["type"] != "http":
            return
        peer = (scope.get("client") or ("?", 0))[0]
        _log.warning("refused", extra={"peer": peer, "method": scope["method"], "path": scope["path"][:200], "status": status, "why": why})
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _credential_error(headers: dict[bytes, bytes], keys: Collection[bytes] | None) -> str:
    """Why a caller's credentials are refused; "" if it has signed with an allowed key. `keys` None allows any key.

    Flower checks that the signature is fresh and that the node belongs to the key.
    """
    try:
        key = b64decode(headers[_KEY], validate=True)
        signature = b64decode(headers[_flwr.FLEET_HTTP_SIGNATURE_HEADER.lower().encode()], validate=True)
        signed = headers[_flwr.TIMESTAMP_HEADER.lower().encode()]
    except KeyError:
        return "no node key"
    except (ValueError, binascii.Error):
        return "an unreadable node key"
    if keys is not None and key not in keys:
        return "a node key that is not allowed"
    try:
        good = _flwr.verify_signature(_flwr.bytes_to_public_key(key), signed, signature)
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm):  # not a key, or of another kind
        return "an unreadable node key"
    return "" if good else "a wrong signature"


def _forgery_error(body: bytes) -> str:
    """Why a push is refused, else "". Flower authenticates the caller but does not compare it with the sender of the message inside."""
    request = _flwr.PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return ""  # Flower refuses it
    node = request.node.node_id
    others = {m.metadata.src_node_id for m in request.messages_list} - {node}
    return f"node {node} pushes a message of node {min(others)}" if others else ""


class StallTimeout(H11Protocol):
    """HTTP protocol that closes stalled requests: uvicorn itself waits forever."""

    _timer: asyncio.TimerHandle | None = None
    _came = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        self._came += len(data)
        if self._timer is None:
            self._start_timer()
        super().data_received(data)
        if self._timer is not None and self.conn.their_state is h11.DONE:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._came = 0
        self._timer = self.loop.call_later(PACE_S, self._check)

    def _check(self) -> None:
        if self._came >= PACE_BYTES or self.conn.their_state is h11.DONE:
            return self._start_timer()
        self.transport.abort()

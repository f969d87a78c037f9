"""Protects a server against untrusted clients: size and depth limits, API keys, host checks, timeouts."""

import asyncio
import hashlib
import hmac
import json
import math
import os
import re
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedtune.config.bounds import require
from fedtune.errors import ConfigError
from fedtune.inference.serve.refusal import Refused
from fedtune.storage.parsing import parse_json, read_text

KEY_VARIABLE = "FEDTUNE_API_KEY"
BODY_S = 30.0  # most seconds for a request to arrive in full
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{0,5})?", re.IGNORECASE | re.ASCII)  # a whole Host header
T = TypeVar("T")
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # a JSON string
_STEPS = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}
_NO_BRACKETS = bytes(set(range(256)) - set(_STEPS))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request.

    Args:
        max_body: Bytes of the body.
        max_depth: Nesting depth of lists and objects.
        max_tokens: Tokens of the answer.
        timeout: Seconds from a request's arrival to the end of its answer.
        grace: Seconds for running answers to finish after a stop signal.
    """

    max_body: int = 1 << 20
    max_depth: int = 16
    max_tokens: int = 1024
    timeout: float = 300.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body", "max_depth", "max_tokens"):
            require(name, getattr(self, name), ge=1)
        require("timeout", self.timeout, ge=0.001, lt=math.inf)
        require("grace", self.grace, ge=0, lt=math.inf)


class ApiKeys:
    """The accepted API keys; without any, every request is accepted.

    Only digests are stored. All of them are compared for every request, in constant time, so that timing reveals nothing.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def find(cls, file: Path | None) -> "ApiKeys":
        """Read keys from a file with one key per line, else from the environment variable FEDTUNE_API_KEY.

        Raises:
            ConfigError: The file cannot be read, there is no key in it, or a key contains a space or is not printable ASCII.
        """
        if file is None:
            if KEY_VARIABLE not in os.environ:
                return cls()
            lines, where = [os.environ[KEY_VARIABLE]], f"the variable {KEY_VARIABLE}"
        else:
            where = str(file)
            try:
                lines = read_text(file).splitlines()
            except (OSError, ValueError) as bad:
                why = getattr(bad, "strerror", None) or "it is not UTF-8 text"
                raise ConfigError(f"cannot read the API keys in {where}: {why}") from None
        keys = [line.strip() for line in lines if line.strip()]
        if not keys or any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise ConfigError(f"{where} must hold API keys, one per line, of printable ASCII without blanks")
        return cls(keys)

    def check(self, request: Request) -> None:
        """Raise Refused (401) unless the request has an accepted key, as `Authorization: Bearer KEY`."""
        if not self._digests:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = _digest(key.strip().encode("latin-1", "replace"))
        known = [hmac.compare_digest(sent, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise Refused(401, "this server requires an API key: send 'Authorization: Bearer KEY'", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def check_host(request: Request) -> None:
    """Raise Refused (403) if a request to a loopback address names another host.

    A malicious web page can point its own domain to 127.0.0.1 and then read this server's responses (DNS rebinding).
    """
    if not LOOPBACK.fullmatch(request.headers.get("host", "")):
        raise Refused(403, "this server accepts requests only for localhost: start it with an API key or another --host", code="wrong_host")


async def read_json(request: Request, limits: Limits) -> Any:
    """Read and parse the body of a request.

    Raises:
        Refused: 415 (content type is not JSON), 413 (too large, with or without a declared length), 408 (too slow), 400 (as in `parse`).
        ClientDisconnect: The client has disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also excludes forms of other sites: browsers send JSON to another origin only after a CORS preflight
        raise Refused(415, "the body must be JSON: send 'Content-Type: application/json'", code="unsupported_media_type")
    too_large = Refused(413, f"the body is larger than {limits.max_body} bytes: shorten it or raise --max-body", code="too_large")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 18 or int(declared) > limits.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(min(BODY_S, limits.timeout)):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body:
                    raise too_large
    except TimeoutError:
        raise Refused(408, "the body did not arrive in time: send it without pauses", code="timeout") from None
    return parse(bytes(body), limits.max_depth)


def parse(body: bytes, max_depth: int) -> Any:
    """Parse strict JSON in UTF-8: no NaN, no Infinity, no number that overflows.

    Raises:
        Refused: 400 (not such JSON, or nested too deep).
    """
    brackets = _TEXT.sub(b"", body).translate(None, _NO_BRACKETS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > max_depth:
        raise Refused(400, f"the body nests lists and objects deeper than {max_depth} levels", code="invalid_json")
    try:
        text = body.decode("utf-8")
        payload = parse_json(text, parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as bad:
        raise Refused(400, f"the body is not UTF-8: byte {bad.start} is invalid", code="invalid_json") from None
    except json.JSONDecodeError as bad:
        raise Refused(
            400, f"the body is not JSON: {bad.msg[:1].lower() + bad.msg[1:]} at character {bad.pos}", code="invalid_json"
        ) from None
    except ValueError:  # raised by _no_number, _finite, and Python's limit on the digits of an int
        raise Refused(400, "the body holds an invalid or too large number (NaN, Infinity, 1e999 …)", code="invalid_json") from None
    if "\\u" in text and not _encodes(payload):
        raise Refused(400, "the body holds half a surrogate pair (\\ud800 to \\udfff): send whole characters", code="invalid_json")
    return payload


def _encodes(payload: Any) -> bool:
    try:
        json.dumps(payload, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_number(name: str) -> float:
    raise ValueError(name)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(digits)
    return value


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`; if the client disconnects first, cancel it. Call this after the body has been read.

    Raises:
        ClientDisconnect: The client has disconnected.
    """
    answer, left = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return await answer
    finally:
        answer.cancel()
        left.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has disconnected."""
    while True:
        try:
            message = await request.receive()
        except ClientDisconnect:
            return
        if message["type"] == "http.disconnect":
            return


class StallTimeout(H11Protocol):
    """HTTP protocol that closes connections whose request head is not complete after BODY_S: uvicorn itself waits forever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(BODY_S, self._check)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waits = self.cycle is None or self.cycle.response_complete
        if self._timer is None and waits:
            self._timer = self.loop.call_later(BODY_S, self._check)
        elif self._timer is not None and not waits:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

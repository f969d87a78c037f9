"""What keeps a server up under strangers: sizes, depths, keys, patience."""

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
from fedtune.inference.serve.protocol import Refused
from fedtune.storage.parsing import parse_json, read_text

KEY_VARIABLE = "FEDTUNE_API_KEY"
BODY_S = 30.0  # a request must have come in full by then
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{0,5})?", re.IGNORECASE | re.ASCII)  # a whole Host header
T = TypeVar("T")
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # in JSON
_STEPS = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}
_NO_BRACKETS = bytes(set(range(256)) - set(_STEPS))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask.

    Args:
        max_body: Bytes of a body.
        max_depth: Lists and objects inside each other.
        max_tokens: Tokens of an answer.
        timeout: Seconds from a request's arrival to the end of its answer.
        grace: Seconds that answers get to end after a signal to stop.
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
    """The keys that may call; none lets anybody in.

    Only digests are kept and compared, each in constant time and all of them every time: how long a refusal takes tells nothing.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def find(cls, file: Path | None) -> "ApiKeys":
        """From a file with one key a line, else from the environment variable FEDTUNE_API_KEY.

        Raises:
            ConfigError: The file cannot be read or holds no key; the variable is empty or has a blank in it.
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
            raise ConfigError(f"{where} must hold API keys, one a line, of printable ASCII without blanks")
        return cls(keys)

    def check(self, request: Request) -> None:
        """Raises Refused (401) unless the request brings a key, as `Authorization: Bearer KEY`."""
        if not self._digests:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        came = _digest(key.strip().encode("latin-1", "replace"))
        known = [hmac.compare_digest(came, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise Refused(401, "this server wants an API key: send 'Authorization: Bearer KEY'", code="invalid_api_key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def check_host(request: Request) -> None:
    """Raises Refused (403) where a request to a loopback address names another host.

    A page of somewhere else can let its own name point to 127.0.0.1 and then read what the server here answers (DNS rebinding).
    """
    if not LOOPBACK.fullmatch(request.headers.get("host", "")):
        raise Refused(403, "this server answers to localhost alone: start it with an API key or another --host", code="wrong_host")


async def read_json(request: Request, limits: Limits) -> Any:
    """The body of a request, parsed.

    Raises:
        Refused: 415 (no JSON), 413 (too large, with or without a declared length), 408 (too slow), 400 (not JSON, or too deep).
        ClientDisconnect: The client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps other sites' forms out: a browser asks before it sends JSON elsewhere
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
        raise Refused(408, "the body did not come in time: send it at once", code="timeout") from None
    return parse(bytes(body), limits.max_depth)


def parse(body: bytes, max_depth: int) -> Any:
    """JSON of UTF-8 and no more than JSON: no NaN, no Infinity, no number that overflows.

    Raises:
        Refused: 400.
    """
    brackets = _TEXT.sub(b"", body).translate(None, _NO_BRACKETS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > max_depth:
        raise Refused(400, f"the body nests deeper than {max_depth} lists and objects", code="invalid_json")
    try:
        text = body.decode("utf-8")
        payload = parse_json(text, parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as bad:
        raise Refused(400, f"the body is not UTF-8: byte {bad.start} is wrong", code="invalid_json") from None
    except json.JSONDecodeError as bad:
        raise Refused(
            400, f"the body is not JSON: {bad.msg[:1].lower() + bad.msg[1:]} at character {bad.pos}", code="invalid_json"
        ) from None
    except ValueError:  # _no_number, _finite, and Python's own limit of digits
        raise Refused(400, "the body holds a number that is none or too large (NaN, Infinity, 1e999 …)", code="invalid_json") from None
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


async def while_there(request: Request, work: Awaitable[T]) -> T:
    """What the work returns, unless the client hangs up first: then the work is canceled. Call it once the body has been read.

    Raises:
        ClientDisconnect: The client has gone.
    """
    under_way, left = asyncio.ensure_future(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((under_way, left), return_when=asyncio.FIRST_COMPLETED)
        if not under_way.done():
            raise ClientDisconnect
        return await under_way
    finally:
        under_way.cancel()
        left.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while True:
        try:
            message = await request.receive()
        except ClientDisconnect:
            return
        if message["type"] == "http.disconnect":
            return


class StallTimeout(H11Protocol):
    """HTTP that hangs up on a head that does not come to its end: uvicorn itself waits for ever."""

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

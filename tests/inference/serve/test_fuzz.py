"""Invalid requests: each gets one sentence, none an internal error or a traceback, and the server keeps running."""

import json
import random
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from fedtune.inference.engine.load import Engine
from fedtune.inference.serve.limits import Limits
from tests.inference.serve.servers import Served, serve_model

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
}
FIELDS = [
    *(
        "model",
        "prompt",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
    ),
    *("top_k", "min_p", "repetition_penalty", "n", "presence_penalty", "frequency_penalty", "logit_bias", "user", "metadata", "logprobs"),
    *("top_logprobs", "echo", "best_of", "suffix", "response_format", "tools", "color"),
]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, -(2**63), 10**30),
    *("", "a", "0", "NaN", "\x00", "\ud7ff", "é" * 400, "👩‍👩‍👧" * 20, "a" * 3000, "</s>", "<|im_end|>", "{{ 7 * 7 }}", "text"),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": ""},
        [0],
        [1, 2, 3],
        [-1],
        [2**40],
        ["a"],
        ["a", "b"],
        ["a", 1],
        [None],
        [1] * 700,
        ["x"] * 40,
        [["user", "a"]],
    ),
    *({"a": 1}, {"role": "user"}, {"include_usage": 1}, {"include_usage": True}, {"type": "text"}, {"type": {"type": {}}}),
    *([{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "system", "content": "x"}] * 50),
    [{"role": "user", "content": [{"type": "text", "text": "a"}] * 9}],
]
BODIES = [
    *(
        b"",
        b"{",
        b"[",
        b"null",
        b"1",
        b'"a"',
        b"[]",
        b"{}{}",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"<xml/>",
        b"model=tiny&prompt=a",
        b"\x00" * 100,
    ),
    *(b"{'model': 1}", b'{"model": "\xc3\x28"}', b'{"model": "\\ud800", "prompt": "a"}', b'{"model": "tiny", "prompt": "a",}'),
    *(b'{"model": "tiny", "prompt": NaN}', b'{"model": "tiny", "prompt": "a", "temperature": Infinity}', b'{"a": 1e400}'),
    *(b"9" * 5000, b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 5000, b'{"a":' * 5000, b'{"model": "tiny", "prompt": "a", "prompt": 1}'),
    json.dumps({"model": "tiny"}).encode("utf-16"),
]
PATHS = [
    *("/", "/v1", "/v1/", "//v1/models", "/v1/models/", "/v1/models/../../etc/passwd", "/v1/models/%00", "/v1/models/%ff", "/%2e%2e/x"),
    *("/v1/x", "/health", "/docs", "/v1/completions/x", "/v1/models/" + "a" * 3000, "/?a=" + "b" * 3000, "/v1/chat", "/favicon.ico"),
]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
RAW = [
    *(b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"),
    HEAD + b"Content-Length: -5\r\n\r\n",
    HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \xff\xff\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\r\n",
]


def wrong_fields(rng: random.Random) -> tuple[str, str, bytes, str]:
    path = rng.choice(list(GOOD))
    payload = dict(GOOD[path])
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.15:
            payload.pop(rng.choice(list(payload)), None) if payload else None
        else:
            payload[rng.choice(FIELDS)] = rng.choice(ODD)
    return "POST", path, json.dumps(payload).encode(), "application/json"


def wrong_messages(rng: random.Random) -> tuple[str, str, bytes, str]:
    message: dict[str, Any] = {"role": "user", "content": "a"}
    for _ in range(rng.randint(1, 2)):
        message[rng.choice(["role", "content", "name", "tool_calls", "x"])] = rng.choice(ODD)
    payload = GOOD["/v1/chat/completions"] | {"messages": [message] * rng.randint(1, 3)}
    return "POST", "/v1/chat/completions", json.dumps(payload).encode(), "application/json"


def wrong_bytes(rng: random.Random) -> tuple[str, str, bytes, str]:
    body = bytearray(rng.choice([*BODIES, *(json.dumps(good).encode() for good in GOOD.values())]))
    for _ in range(rng.randint(0, 4)):
        if body:
            body[rng.randrange(len(body))] = rng.randrange(256)
    return "POST", rng.choice(list(GOOD)), bytes(body), rng.choice(["application/json"] * 4 + ["text/plain", "", "application/json;"])


def wrong_routes(rng: random.Random) -> tuple[str, str, bytes, str]:
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"])
    return method, rng.choice([*PATHS, *GOOD]), rng.choice([b"", b"{}"]), rng.choice(["application/json", ""])


KINDS: list[Callable[[random.Random], tuple[str, str, bytes, str]]] = [wrong_fields] * 4 + [
    wrong_messages,
    wrong_bytes,
    wrong_bytes,
    wrong_routes,
]


def fuzz(server: Served, count: int, seed: int) -> dict[int, int]:
    """Sends `count` requests; returns how often each status came."""
    rng, seen = random.Random(seed), {}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for _ in range(count):
            method, path, body, kind = rng.choice(KINDS)(rng)
            answer = client.request(method, path, content=body, headers={"content-type": kind} if kind else {})
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            where = f"{method} {path[:80]} {body[:300]!r} {kind}"
            assert answer.status_code < 500, f"{where}: {answer.text}"
            assert "Traceback" not in answer.text and 'File "' not in answer.text, where
            if answer.status_code >= 400 and method != "HEAD":
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"], where
                assert "\n" not in error["message"] and len(error["message"]) < 400, f"{where}: {error}"
            elif answer.status_code == 200 and path in GOOD and not answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.json()["choices"], where
    for raw in RAW:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
            line.sendall(raw)
            line.shutdown(socket.SHUT_WR)
            got = b""
            try:
                while part := line.recv(65536):
                    got += part
            except ConnectionResetError:
                pass
            assert not got.startswith(b"HTTP/1.1 5") and b"Traceback" not in got, raw[:80]
    assert client_is_served(server)
    return seen


def client_is_served(server: Served) -> bool:
    return httpx.post(f"{server.url}/v1/completions", json=GOOD["/v1/completions"]).status_code == 200 and server.scheduler.load == (0, 0)


def test_some_odd_requests_cause_no_server_error(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with serve_model(engine, limits=Limits(max_tokens=64, grace=1)) as server:
        seen = fuzz(server, 60, seed=0)
    assert set(seen) >= {200, 400, 404, 405}
    assert not [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info]


@pytest.mark.slow
def test_two_thousand_odd_requests_cause_no_server_error(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with serve_model(engine, limits=Limits(max_tokens=64, grace=1)) as server:
        seen = fuzz(server, 2000, seed=1)
    assert sum(seen.values()) == 2000
    assert not [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info]

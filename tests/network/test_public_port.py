"""A caller without an allowed key can do nothing at the public port."""

import asyncio
import contextlib
import random
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedtune.network import _flwr, public
from fedtune.network.incarnations import INCARNATION_HEADER
from fedtune.network.link import LinkSettings, SuperLink
from fedtune.network.public import ACTIVATE, ENDPOINTS, PULL, PUSH, PublicPort, StallTimeout
from fedtune.network.superlink import ProcessSettings, _make_app
from tests.network.echo import Echo, Key, new_key, round_trip, small

WHITE = {"/health"} | {f"/v1/fleet/{name}" for name in ("get-run", "pull-messages", "push-messages", "pull-object", "push-object")}
MAX = 1000


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("link"))
    return _make_app(
        ProcessSettings(
            folder=folder,
            log="",
            host="",
            port=0,
            private_port=0,
            certificate=None,
            certificate_key=None,
            allowed_keys=None,
            max_body=1,
            parent=0,
        ),
        None,
    )[0]


class Inside:
    """An application behind the filter that records the bodies it receives."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def call(
    port: PublicPort, path: str, parts: list[bytes | None], method: str = "POST", headers: dict[str, str] | None = None, kind: str = "http"
) -> tuple[int, int]:
    """(status, number of body parts read); a part None is a caller that disconnects. Status 0: no answer."""
    answered, read = [], 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        part = parts[read - 1]
        return {"type": "http.disconnect"} if part is None else {"type": "http.request", "body": part, "more_body": read < len(parts)}

    async def send(event: Any) -> None:
        answered.append(event.get("status", 0))

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    asyncio.run(port({"type": kind, "method": method, "path": path, "headers": raw, "client": ("192.0.2.1", 9)}, receive, send))
    return (answered or [0])[0], read


def sign_headers(key: Key, claimed: Key | None = None) -> dict[str, str]:
    stamp = "2026-01-01T00:00:00+00:00"
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes((claimed or key).public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, stamp.encode())).decode(),
        _flwr.TIMESTAMP_HEADER: stamp,
    }


def test_only_fleet_and_health_are_open(app: Any) -> None:
    assert {path for _, path in ENDPOINTS} > WHITE
    assert all(path == "/health" or (method == "POST" and path.startswith("/v1/fleet/")) for method, path in ENDPOINTS)
    inside = Inside()
    port = PublicPort(inside, max_body=MAX, keys=None)
    paths = {route[1] for route in _flwr.PROTOBUF_REQUEST_TYPES} | set(app.openapi()["paths"]) | {"/docs", "/openapi.json", "/redoc", "/"}
    closed = {path for path in paths if path not in {p for _, p in ENDPOINTS}}
    assert len([p for p in closed if p.startswith("/v1/control/")]) > 30 and len([p for p in closed if p.startswith("/v1/runtime/")]) > 15
    for path in closed:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
            assert call(port, path, [b"x"], method) == (404, 0)
    for twisted in (
        "/v1/fleet/../control/list-runs",
        "//v1/fleet/get-run",
        "/v1/fleet/get-run/",
        "/V1/fleet/get-run",
        "/v1/fleet/get-run?",
        "",
    ):
        assert call(port, twisted, [b"x"]) == (404, 0)
    assert call(port, "/v1/fleet/get-run", [b"x"], "GET") == (404, 0)
    assert call(port, "/v1/fleet/get-run", [b"x"], kind="websocket") == (0, 0)
    assert inside.bodies == []


def test_the_bodies_of_one_caller_have_a_total_limit() -> None:
    """Four concurrent requests of 400 bytes with a limit of 1000 bytes per caller: two pass, and their bytes are released."""
    inside, caller = Inside(), {FLEET_HTTP_PUBLIC_KEY_HEADER: "a"}
    port = PublicPort(inside, max_body=MAX, keys=None)

    def scope(headers: dict[str, str]) -> Any:
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http", "method": "POST", "path": "/v1/fleet/push-object", "headers": raw, "client": ("192.0.2.1", 9)}

    async def at_once() -> list[int]:
        held, statuses = asyncio.Event(), list[int]()

        async def one(headers: dict[str, str]) -> None:
            sent = False

            async def receive() -> Any:
                nonlocal sent
                if sent:
                    await held.wait()
                    return {"type": "http.request", "body": b"", "more_body": False}
                sent = True
                return {"type": "http.request", "body": b"x" * 400, "more_body": True}

            async def send(event: Any) -> None:
                if "status" in event:
                    statuses.append(event["status"])

            await port(scope(headers), receive, send)

        tasks = [asyncio.create_task(one(caller)) for _ in range(4)] + [asyncio.create_task(one({FLEET_HTTP_PUBLIC_KEY_HEADER: "b"}))]
        for _ in range(100):
            await asyncio.sleep(0)
        held.set()
        await asyncio.gather(*tasks)
        return statuses

    assert asyncio.run(at_once()) == [429, 429, 200, 200, 200]
    assert len(inside.bodies) == 3
    assert call(port, "/v1/fleet/push-object", [b"x" * 900], headers=caller) == (200, 1)


def test_a_large_body_is_refused_before_it_is_read() -> None:
    inside = Inside()
    port = PublicPort(inside, max_body=MAX, keys=None)
    assert call(port, "/v1/fleet/push-object", [b"x"] * 9, headers={"content-length": str(MAX + 1)}) == (413, 0)
    assert call(port, "/v1/fleet/push-object", [b"x" * 400] * 9) == (413, 3)  # not declared: 400 + 400 + 400 > 1000
    assert call(port, "/v1/fleet/push-object", [b"x"], headers={"content-length": "many"}) == (413, 0)
    assert inside.bodies == []
    assert call(port, "/v1/fleet/push-object", [b"x" * 400, b"y" * 600]) == (200, 2)
    assert inside.bodies == [b"x" * 400 + b"y" * 600]


def test_an_incomplete_body_does_not_reach_flower() -> None:
    inside = Inside()
    assert call(PublicPort(inside, max_body=MAX, keys=None), "/v1/fleet/push-object", [b"x", None]) == (0, 2)
    assert inside.bodies == []


def test_an_unknown_caller_is_refused_before_the_body_is_read() -> None:
    inside, key, other = Inside(), new_key(), new_key()
    port = PublicPort(inside, max_body=MAX, keys={public_key_to_bytes(key.public_key())})
    for headers in (
        {},
        sign_headers(other),
        sign_headers(other, claimed=key),
        {**sign_headers(key), FLEET_HTTP_PUBLIC_KEY_HEADER: "no base64 é".replace("é", "!")},
    ):
        assert call(port, "/v1/fleet/push-object", [b"x"], headers=headers) == (401, 0)
    assert inside.bodies == []
    assert call(port, "/v1/fleet/push-object", [b"x"], headers=sign_headers(key)) == (200, 1)
    assert call(port, "/health", [b""], "GET")[0] == 200  # for any caller


def test_no_node_can_call_in_the_name_of_another() -> None:
    inside = Inside()
    port = PublicPort(inside, max_body=MAX, keys=None)
    request = PushMessagesRequest()
    request.node.node_id = 3
    request.messages_list.add().metadata.src_node_id = 3
    assert call(port, PUSH, [request.SerializeToString()])[0] == 200
    request.messages_list.add().metadata.src_node_id = 4  # Flower itself checks only the 3 above
    assert call(port, PUSH, [request.SerializeToString()])[0] == 403
    assert len(inside.bodies) == 1


def test_a_new_node_is_announced_only_by_its_own_signature() -> None:
    came: list[bytes] = []
    key, other = new_key(), new_key()
    for keys in (None, {public_key_to_bytes(key.public_key())}):
        port = PublicPort(Inside(), max_body=MAX, keys=keys, take_over=came.append)
        for headers in ({}, sign_headers(other, claimed=key), {**sign_headers(key), FLEET_HTTP_PUBLIC_KEY_HEADER: "aGVsbG8="}):
            call(port, ACTIVATE, [b""], headers=headers)
        assert came == []
        assert call(port, ACTIVATE, [b""], headers=sign_headers(key))[0] == 200
        assert came == [public_key_to_bytes(key.public_key())]
        came.clear()


def test_only_a_fedtune_node_reports_by_a_poll_that_it_is_idle() -> None:
    """Flower's own SuperNode sends no process id, and polls for the next message while it works on one."""
    idle: list[bytes] = []
    key, other = new_key(), new_key()
    for keys in (None, {public_key_to_bytes(key.public_key())}):
        port = PublicPort(Inside(), max_body=MAX, keys=keys, redeliver_lost=idle.append)
        life = {INCARNATION_HEADER: "one"}
        for path, headers in ((PULL, sign_headers(key)), (PULL, sign_headers(other, claimed=key) | life), (PUSH, sign_headers(key) | life)):
            call(port, path, [b""], headers=headers)
        assert idle == []
        assert call(port, PULL, [b""], headers=sign_headers(key) | life)[0] == 200
        assert idle == [public_key_to_bytes(key.public_key())]
        idle.clear()


def test_two_polls_of_one_node_keep_their_order() -> None:
    """The node gave up its first request: the message that it takes is lost, and only a later poll may detect this."""
    order: list[str] = []
    headers = [(name.lower().encode(), value.encode()) for name, value in (sign_headers(new_key()) | {INCARNATION_HEADER: "one"}).items()]
    scope = {"type": "http", "method": "POST", "path": PULL, "headers": headers, "client": ("192.0.2.1", 9)}

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        order.append("flower begins")
        await asyncio.sleep(0.05)
        order.append("flower ends")

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(event: Any) -> None: ...

    async def both() -> None:
        port = PublicPort(flower, max_body=MAX, keys=None, redeliver_lost=lambda _: order.append("looked"))
        await asyncio.gather(port(scope, receive, send), port(scope, receive, send))

    asyncio.run(both())
    assert order == ["looked", "flower begins", "flower ends"] * 2


@pytest.mark.parametrize("host", ["link", "x/v1/runtime/push-object?", "x/health#"])
def test_no_host_header_bypasses_authentication(app: Any, host: str) -> None:
    """Flower takes the path to guard from the URL, which includes the host header, and the path to serve from the request line."""

    async def run() -> int:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(PublicPort(app, max_body=MAX, keys=None)), base_url="http://link"
        ) as client:
            headers = {"host": host, "content-type": "application/protobuf"}
            return (await client.post("/v1/fleet/push-object", headers=headers, content=b"")).status_code

    assert asyncio.run(run()) == 401


def noise(draw: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """One random request: method, path, headers, body. Half of them use open paths, some the first bytes of a real message."""
    method = draw.choice(["POST", "POST", "POST", "GET", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS"])
    paths = sorted(path for _, path in ENDPOINTS)
    path = draw.choice(paths) if draw.random() < 0.6 else "/" + "".join(draw.choices("/.%abcxyz01-_~", k=draw.randrange(30)))
    body = draw.randbytes(draw.choice([0, 1, 2, 7, 100, 3000]))
    if draw.random() < 0.3:  # bytes that parse
        request = PushMessagesRequest()
        request.node.node_id = draw.getrandbits(64)
        request.messages_list.add().metadata.run_id = draw.getrandbits(64)
        body = request.SerializeToString()[: draw.choice([5, 10_000])]
    headers = {"content-type": draw.choice(["application/x-protobuf", "application/protobuf", "application/json", "x"])}
    if draw.random() < 0.5:
        headers |= sign_headers(new_key())
        headers[_flwr.TIMESTAMP_HEADER] = draw.choice(["", "0", "9999-12-31T23:59:59+00:00", headers[_flwr.TIMESTAMP_HEADER]])
    if draw.random() < 0.1:
        headers["host"] = draw.choice(["x/v1/runtime/push-object?", "a@b", "[::1", "é".encode().decode("latin-1")])
    return method, path, headers, body


@pytest.mark.slow
def test_random_requests_crash_nothing(app: Any) -> None:
    draw = random.Random(6)
    statuses: dict[int, int] = {}

    async def run() -> None:
        transport = httpx.ASGITransport(PublicPort(app, max_body=MAX, keys=None), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://link") as client:
            for _ in range(200):
                method, path, headers, body = noise(draw)
                raw = [(k, v.encode("latin-1")) for k, v in headers.items()]
                answer = await client.request(method, path, headers=raw, content=body)  # type: ignore[arg-type]
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert (await client.get("/health")).status_code == 200

    asyncio.run(run())
    assert all(status >= 400 or status == 200 for status in statuses) and statuses[404] > 50 and len(statuses) > 3


@pytest.fixture
def impatient_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port that requires 16 KiB every 0.5 s, or the end of the request."""
    monkeypatch.setattr(public, "PACE_S", 0.5)
    server = uvicorn.Server(
        uvicorn.Config(PublicPort(Inside(), max_body=10**6, keys=None), http=StallTimeout, lifespan="off", log_config=None)
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield sock.getsockname()[1]
        server.should_exit = True
        thread.join(5)


def test_a_stalling_caller_is_disconnected_and_blocks_nobody(impatient_port: int) -> None:
    starts = [b"", b"POST /v1/fl", b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\nabc"]
    dawdlers = [socket.create_connection(("127.0.0.1", impatient_port)) for _ in range(60)]
    for number, dawdler in enumerate(dawdlers):
        dawdler.sendall(starts[number % 3])
    assert httpx.post(f"http://127.0.0.1:{impatient_port}/v1/fleet/push-object", content=b"x" * 500_000).status_code == 200
    for dawdler in dawdlers:
        dawdler.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert dawdler.recv(1) == b""
        dawdler.close()


def test_a_slow_but_steady_caller_is_served(impatient_port: int) -> None:
    def drip() -> Iterator[bytes]:
        for _ in range(6):  # 0.6 s in all, longer than the 0.5 s that a caller may pause
            time.sleep(0.1)
            yield b"x" * public.PACE_BYTES

    with httpx.Client() as client:
        for content in (drip(), b"and the next one on the same connection"):
            assert client.post(f"http://127.0.0.1:{impatient_port}/v1/fleet/push-object", content=content).status_code == 200


def _send_garbage(port: int, draw: random.Random) -> None:
    """Bytes that are not HTTP, or an incomplete request."""
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n" if draw.random() < 0.5 else b""
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(head + draw.randbytes(draw.randrange(1, 800)))


@pytest.mark.slow
def test_5000_random_bodies_leave_a_real_link_working(tmp_path: Path) -> None:
    link = SuperLink(LinkSettings(folder=tmp_path / "superlink", host="127.0.0.1", port=0, certificates=None, insecure=True, max_body_mb=6))
    link.start()
    try:
        grid, draw = link.open_run("noise"), random.Random(5000)
        assert link._child is not None
        process = link._child.process.pid
        with Echo(link.port) as node:
            for number in range(5000):
                if number % 5 == 4:
                    _send_garbage(link.port, draw)
                    continue
                if number % 80 == 0:
                    http = httpx.Client()
                method, path, headers, body = noise(draw)
                raw = [(name, value.encode("latin-1")) for name, value in headers.items()]
                try:
                    answer = http.request(method, f"http://127.0.0.1:{link.port}{path}", headers=raw, content=body)  # type: ignore[arg-type]
                except httpx.RemoteProtocolError:
                    continue
                assert answer.status_code >= 400 or path == "/health"
                if number % 1000 == 0:
                    assert round_trip(grid, small(number), node.node.node_id).content.config_records["c"]["value"] == number
            assert round_trip(grid, small(7), node.node.node_id).content.config_records["c"]["value"] == 7
        assert link.alive and link._child.process.pid == process
    finally:
        link.stop()

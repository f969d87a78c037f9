"""A server leaves a socket that another server continues to serve: no accepted request is lost."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from fedtune.inference.engine.load import Engine
from fedtune.inference.serve.listener import listen, url
from fedtune.inference.serve.server import HttpServer
from tests.inference.serve.servers import serve_model


class App:
    """Answers with its name; `/long` first waits for `go`."""

    def __init__(self, name: str) -> None:
        self.name, self.go, self.asked = name, threading.Event(), threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.set()
        headers = [(b"content-length", str(len(self.name)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["path"] == "/long":
            await asyncio.to_thread(self.go.wait, 20)
        await send({"type": "http.response.body", "body": self.name.encode()})


@contextmanager
def serve_in_thread(app: App, listener: socket.socket) -> Iterator[tuple[HttpServer, threading.Thread]]:
    accepts = threading.Event()
    server = HttpServer(app, connections=64, ready=accepts.set)
    thread = threading.Thread(target=server.run, args=([listener.dup()],), daemon=True)
    thread.start()
    assert accepts.wait(20)
    try:
        yield server, thread
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.slow
def test_another_server_takes_over_the_socket() -> None:
    old, new = App("old"), App("new")
    with listen("127.0.0.1", 0) as listener, httpx.Client(timeout=20) as idle, serve_in_thread(old, listener) as (server, thread):
        assert idle.get(url(listener)).text == "old"
        late: list[str] = []
        keeper = httpx.Client(timeout=20)
        long = threading.Thread(target=lambda: late.append(keeper.get(url(listener) + "/long").text))
        old.asked.clear()
        long.start()
        assert old.asked.wait(20)
        with serve_in_thread(new, listener):
            server.leave(60)
            assert server.left.wait(20)
            assert {httpx.get(url(listener), timeout=20).text for _ in range(20)} == {"new"}
            answer = idle.get(url(listener))  # the connection had been accepted
            assert (answer.text, answer.headers["connection"]) == ("old", "close")
            assert idle.get(url(listener)).text == "new"
            assert thread.is_alive() and not late
            old.go.set()
            long.join(20)
            assert late == ["old"] and thread.is_alive()  # the answer began without the header, so the client may reuse the connection
            answer = keeper.get(url(listener))
            assert (answer.text, answer.headers["connection"]) == ("old", "close")
            ended = time.monotonic()
            thread.join(20)
            assert not thread.is_alive()
            assert time.monotonic() - ended < 4  # an idle connection would stay for 5 s
            keeper.close()


def test_the_grace_time_ends_a_long_answer() -> None:
    app = App("old")
    with listen("127.0.0.1", 0) as listener, serve_in_thread(app, listener) as (server, thread):
        with httpx.stream("GET", url(listener) + "/long", timeout=20) as answer:
            began = time.monotonic()
            server.leave(0.4)
            while server.should_exit is False:
                assert time.monotonic() < began + 10
                time.sleep(0.01)
            assert time.monotonic() - began >= 0.4
            app.go.set()
            answer.read()
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.slow
def test_a_model_finishes_its_streams_and_takes_requests_on_open_connections(engine: Engine) -> None:
    ask = {"model": "tiny", "prompt": "turn on", "max_tokens": 200, "temperature": 0, "stream": True}
    with serve_model(engine, pace=0.01) as server, httpx.Client(timeout=20) as idle:
        idle.get(f"{server.url}/health")
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ask, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.leave(60)
            assert server.server.left.wait(20)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/health")
            assert idle.post(f"{server.url}/v1/completions", json=ask | {"stream": False, "max_tokens": 2}).status_code == 200
            assert [line for line in lines if line][-1] == "data: [DONE]"

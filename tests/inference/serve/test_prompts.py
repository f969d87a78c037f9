"""Long prompts: refused by length, tokenized in the background, and dropped if the client disconnects."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, models

from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.text import Text
from fedtune.inference.serve import prompts
from fedtune.inference.serve.limits import Limits
from tests.inference.serve.servers import Served, serve_model, tiny_model

CONTEXT = 4096
SHORT: dict[str, Any] = {"model": "tiny", "prompt": "turn on", "temperature": 0, "max_tokens": 2}
LONG = SHORT | {"prompt": "turn on " * 2100}  # with the longest tokens it would fit the context; longer than prompts.LONG


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(tiny_model(tmp_path_factory.mktemp("large") / "tiny", context=CONTEXT))


class Gate:
    """Blocks the tokenization of long prompts until it is opened."""

    def __init__(self, encode: Any) -> None:
        self._encode, self._open = encode, threading.Event()
        self.began = 0

    def __call__(self, text: str, *, begin: bool = True) -> list[int]:
        if len(text) > prompts.LONG:
            self.began += 1
            assert self._open.wait(60)
        return self._encode(text, begin=begin)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(large: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(large.text.encode)
    monkeypatch.setattr(large.text, "encode", made)
    yield made
    made.open()


def post(server: Served, payload: Any, path: str = "completions") -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=payload, timeout=40)


def wait_for(what: Any) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_rendered_or_tokenized(large: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a prompt that cannot fit was worked on")

    words = "turn " * (CONTEXT * large.text.longest // 5 + 1)
    message = {"role": "user", "content": words}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": words[: len(words) // 2]}] * 3}
    monkeypatch.setattr(large.text, "encode", never)
    with serve_model(large) as server:
        copies = "{% for i in range(99) %}{{ messages[0].content }}{% endfor %}"
        monkeypatch.setattr(large.text, "template", copies)
        answers = [post(server, {"model": "tiny", "messages": [{"role": "user", "content": words[:10_000]}]}, "chat/completions")]
        monkeypatch.setattr(large.text, "chat", never)
        answers += [post(server, SHORT | {"prompt": words}), post(server, chat, "chat/completions")]
        answers += [post(server, {"model": "tiny", "messages": [message]}, "chat/completions")]
    for answer in answers:
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
        assert f"characters are too many for {CONTEXT} tokens" in answer.json()["error"]["message"]


def test_the_longest_prompt_that_can_fit_is_not_refused(engine: Engine) -> None:
    longest = " television"  # no token of the vocabulary has more characters
    assert engine.text.longest == len(longest)
    lead, room = len(engine.text.encode(longest)) - 1, engine.shape.context - SHORT["max_tokens"]
    with serve_model(engine) as server:
        assert post(server, SHORT | {"prompt": longest * (room - lead)}).json()["usage"]["prompt_tokens"] == room
        refused = post(server, SHORT | {"prompt": longest * (room - lead + 1)}).json()
        assert "shorten one" in refused["error"]["message"]


def test_long_prompts_delay_no_other_request_and_their_queue_is_limited(large: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LONG_WAITING", 12)
    with serve_model(large, max_waiting=64) as server, ThreadPoolExecutor(14) as clients:
        waiting = [clients.submit(post, server, LONG) for _ in range(14)]
        wait_for(lambda: sum(client.done() for client in waiting) == 2)
        for client in [client for client in waiting if client.done()]:
            waiting.remove(client)
            assert client.result().status_code == 429 and "the queue of long prompts is full" in client.result().text
        assert post(server, SHORT).status_code == 200
        message = {"role": "user", "content": "hello"}
        assert post(server, {"model": "tiny", "messages": [message], "max_tokens": 1}, "chat/completions").status_code == 200
        assert gate.began == 1 and not any(client.done() for client in waiting)
        gate.open()
        assert {client.result().status_code for client in waiting} == {400}  # more tokens than the context


def test_a_client_that_waits_too_long_gets_an_error(large: Engine, gate: Gate) -> None:
    with serve_model(large, limits=Limits(timeout=0.5, grace=5)) as server:
        answer = post(server, LONG)
    assert answer.status_code == 504 and "waited longer" in answer.text


def test_a_client_that_disconnects_leaves_the_queue(large: Engine, gate: Gate) -> None:
    body = json.dumps(LONG).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with serve_model(large) as server, ThreadPoolExecutor(1) as client:
        sockets = [server.raw() for _ in range(prompts.LONG_WAITING)]
        for connection in sockets:
            connection.sendall(head.encode() + body)
        wait_for(lambda: gate.began == 1)
        wait_for(lambda: post(server, LONG).status_code == 429)
        for connection in sockets:
            connection.close()
        time.sleep(0.3)
        last = client.submit(post, server, LONG)
        time.sleep(0.3)
        gate.open()
        assert last.result().status_code == 400  # it is queued, but has more tokens than the context
        assert gate.began == 2  # prompts of disconnected clients are not tokenized


def test_tokenizing_lets_other_threads_run() -> None:
    alphabet = sorted({chr(c) for c in range(97, 123)})
    pairs = [(a, b) for a in alphabet[:20] for b in alphabet[:20]]
    vocabulary = {w: i for i, w in enumerate([*alphabet, *("".join(p) for p in pairs)])}
    text = Text(Tokenizer(models.BPE(vocabulary, pairs)), bos=None, ends=frozenset(), template=None, names={})
    ticks, tokenizing = 0, True

    def tick() -> None:
        nonlocal ticks
        while tokenizing:
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    text.encode("abcdefghijklmnopqrst" * 20_000)
    during = ticks - before
    tokenizing = False
    thread.join()
    assert during >= 20  # if tokenizing held Python's lock, one or two

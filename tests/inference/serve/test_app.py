"""The server over real sockets: routes, limits, disconnects, stopping."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.serve.answer import PATIENCE_S, Answer, EventStream
from fedtune.inference.serve.app import create_app
from fedtune.inference.serve.formats import ResponseFormatter
from fedtune.inference.serve.limits import ApiKeys, Limits
from fedtune.inference.serve.served_model import ServedModel
from tests.inference.serve.servers import Served, answer_alone, serve_model, text_of

ASK = {"model": "tiny", "prompt": "turn on the light", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def here(engine: Engine) -> Iterator[Served]:
    with serve_model(engine) as server:
        yield server


def post(server: Served, payload: Any, path: str = "completions", **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=payload, timeout=20, **more)


def wait_for(what: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_completion_equals_the_engines_answer(here: Served) -> None:
    answer = post(here, ASK).json()
    outputs = answer_alone(here.engine, here.engine.text.encode(ASK["prompt"]), Sampling(), 12, joins=True)
    assert answer["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": text_of(outputs)}]
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens"] == len(here.engine.text.encode(ASK["prompt"]))
    ids = here.engine.text.encode(ASK["prompt"])
    assert post(here, ASK | {"prompt": ids}).json()["choices"][0]["text"] == text_of(outputs)


def test_a_stream_joins_to_the_complete_answer(here: Served) -> None:
    seeded = ASK | {"temperature": 1.0, "seed": 3, "max_tokens": 30}
    whole = post(here, seeded).json()["choices"][0]
    with httpx.stream("POST", f"{here.url}/v1/completions", json=seeded | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_a_chat_goes_through_the_template(here: Served) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    answer = post(here, {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 5}, "chat/completions").json()
    ids = here.engine.text.encode("system: be brief\nuser: hello\nassistant:", begin=False)
    assert answer["choices"][0]["message"]["content"] == text_of(answer_alone(here.engine, ids, Sampling(), 5)).lstrip()
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_a_failing_template_is_a_server_error_and_a_refusing_one_a_client_error(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}{{ 1 / (messages | length - 2) }}"
    old, engine.text.template = engine.text.template, picky
    try:
        with serve_model(engine) as server:
            user, system = {"role": "user", "content": "hello"}, {"role": "system", "content": "be brief"}
            chat = {"model": "tiny", "max_tokens": 2}
            assert post(server, chat | {"messages": [user]}, "chat/completions").status_code == 200
            for messages, status, why in [([system, user], 400, "no system message"), ([user, user], 500, "division by zero")]:
                refused = post(server, chat | {"messages": messages}, "chat/completions")
                assert refused.status_code == status and why in refused.json()["error"]["message"]
    finally:
        engine.text.template = old
    assert [record.message for record in caplog.records if "template" in record.message] == [
        "the model's chat template failed: division by zero"
    ]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("pieces", "chat"),
    [
        ([" on", " and", " off "], "on and off "),
        (["", " ", "\n", "  on", "", "\n off"], "on\n off"),
        (["on", " off"], "on off"),
        ([" ", " "], ""),
    ],
)
def test_a_chat_answer_does_not_begin_with_the_space_of_its_first_word(engine: Engine, pieces: list[str], chat: str, stream: bool) -> None:
    def submit(request: GenerationRequest) -> None:
        for i, piece in enumerate(pieces):
            request.deliver(Output(piece, 5, end="length" if i == len(pieces) - 1 else None))

    scheduler: Any = SimpleNamespace(submit=submit, cancel=lambda request: None, full=False, draining=False, limit=512)
    app = create_app(scheduler, ServedModel(name="tiny", text=engine.text), Limits(), ApiKeys(), local=False)

    async def ask(path: str, **more: Any) -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            answer = await client.post(f"/v1/{path}", json={"model": "tiny", "stream": stream, **more})
        if not stream:
            choice = answer.json()["choices"][0]
            return choice.get("text", choice.get("message", {}).get("content"))
        chunks = [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n") if line and line != "data: [DONE]"]
        parts = [chunk["text"] if "text" in chunk else chunk["delta"].get("content") for chunk in chunks]
        assert all(parts[i] for i in range(1, len(parts) - 1))  # only the first and the last event are empty
        return "".join(part or "" for part in parts)

    assert asyncio.run(ask("chat/completions", messages=[{"role": "user", "content": "a"}])) == chat
    assert asyncio.run(ask("completions", prompt="a")) == "".join(pieces)


def test_without_a_seed_answers_differ(here: Served) -> None:
    free = ASK | {"temperature": 1.0, "max_tokens": 24}
    assert post(here, free).json()["choices"][0]["text"] != post(here, free).json()["choices"][0]["text"]


def test_each_route_answers(here: Served) -> None:
    listed = httpx.get(f"{here.url}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["tiny"]
    assert httpx.get(f"{here.url}/v1/models/tiny").json() == listed[0]
    assert httpx.get(f"{here.url}/health").json()["status"] == "ok"
    for method, path, status in [
        ("GET", "/v1/models/other", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/completions/", 404),
        ("OPTIONS", "/v1/completions", 405),
    ]:
        answer = httpx.request(method, here.url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert not [name for name in answer.headers if name.startswith("access-control")]  # no CORS


@pytest.mark.parametrize(
    ("change", "status", "why"),
    [
        ({"model": "other"}, 404, "use tiny"),
        ({"max_tokens": 2000}, 400, "exceed this server's limit of 1024: request fewer"),
        ({"prompt": "a" * 5000}, 400, "fill the model's context of 512"),
        ({"prompt": "a", "max_tokens": 600}, 400, "exceed the model's context of 512"),
        ({"prompt": [5, 2000]}, 400, "token id 2000 in the prompt is out of range"),
        ({"n": 2}, 400, "one answer per request"),
    ],
)
def test_invalid_requests_are_refused(here: Served, change: dict[str, Any], status: int, why: str) -> None:
    answer = post(here, ASK | change)
    assert (answer.status_code, why in answer.json()["error"]["message"]) == (status, True)


def test_an_error_about_a_server_limit_names_its_option(engine: Engine) -> None:
    with serve_model(engine, limits=Limits(max_tokens=10, grace=1)) as server:
        refused = post(server, ASK | {"max_tokens": 11}).json()["error"]
        assert refused["message"] == "11 new tokens exceed this server's limit of 10: request fewer, or start it with --max-tokens 11"
        beyond = post(server, ASK | {"max_tokens": 5000}).json()["error"]
        assert beyond["message"].endswith("request fewer")  # a higher --max-tokens would exceed the model's context
        assert post(server, ASK | {"max_tokens": 10}).status_code == 200


def test_bodies_must_be_json_and_small(here: Served) -> None:
    url = f"{here.url}/v1/completions"
    assert httpx.post(url, content=json.dumps(ASK), headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(url, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    large = b"[" + b" " * (1 << 20) + b"]"
    assert httpx.post(url, content=large, headers={"content-type": "application/json"}).status_code == 413
    # in chunks, without a declared length
    assert (
        httpx.post(url, content=iter([large[:700_000], large[700_000:]]), headers={"content-type": "application/json"}).status_code == 413
    )
    chunked = iter([json.dumps(ASK).encode()[:10], json.dumps(ASK).encode()[10:]])
    assert httpx.post(url, content=chunked, headers={"content-type": "application/json; charset=utf-8"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost:evil.example", "[::1]evil.example"])
def test_a_foreign_host_name_is_refused(here: Served, host: str) -> None:
    for path in ("/", "/v1/models"):
        assert httpx.get(here.url + path, headers={"host": host}).status_code == 403
    assert post(here, ASK, headers={"host": host}).status_code == 403


def test_requests_need_the_key(engine: Engine) -> None:
    with serve_model(engine, keys=("secret",)) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(server.url).status_code == 200  # the page asks for the key itself
        for path in ("/v1/models", "/v1/models/tiny"):
            assert httpx.get(server.url + path).status_code == 401
        refused = post(server, ASK)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["type"] == "authentication_error"
        key = {"authorization": "Bearer secret"}
        assert post(server, ASK, headers=key | {"host": "models.example"}).status_code == 200  # as behind a proxy


def test_a_single_request_model_accepts_one_message(tmp_path: Any, engine: Engine) -> None:
    from fedtune.inference.engine.load import Engine as Made
    from fedtune.inference.engine.text import Text

    text = Text(engine.text.tokenizer, bos=0, ends=frozenset({1}), template=None, names={})
    plain = Made(engine.folder, engine.decoder)
    plain.__dict__["text"] = text
    chat = {"model": "tiny", "temperature": 0, "max_tokens": 4, "messages": [{"role": "user", "content": "warm"}]}
    with serve_model(plain, prompt="Request: {text}\nAction:") as server:
        answer = post(server, chat, "chat/completions").json()
        ids = text.encode("Request: warm\nAction:")
        assert answer["choices"][0]["message"]["content"] == text_of(answer_alone(plain, ids, Sampling(), 4)).lstrip()
        two = chat | {"messages": [*chat["messages"], *chat["messages"]]}
        assert "send one message" in post(server, two, "chat/completions").json()["error"]["message"]
    with serve_model(plain) as server:
        refused = post(server, chat, "chat/completions")
        assert (refused.status_code, "use /v1/completions" in refused.json()["error"]["message"]) == (400, True)


def test_a_full_queue_says_when_to_retry(engine: Engine) -> None:
    with serve_model(engine, pace=0.01, max_running=1, max_waiting=1) as server:
        long = ASK | {"max_tokens": 20}
        threads = [threading.Thread(target=post, args=(server, long)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: sum(server.scheduler.load) == 2)
        refused = post(server, ASK)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert post(server, ASK).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_ends_the_work(engine: Engine, stream: bool) -> None:
    with serve_model(engine, pace=0.01) as server:
        body = json.dumps(ASK | {"max_tokens": 400, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with server.raw() as line:
            line.sendall(head.encode() + body)
            wait_for(lambda: server.scheduler.load == (1, 0))
            if stream:
                assert line.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.scheduler.load == (0, 0))
        assert server.scheduler.passes < 400


def test_requests_time_out(engine: Engine) -> None:
    with serve_model(engine, limits=Limits(timeout=0.15, grace=1), pace=0.02) as server:
        refused = post(server, ASK | {"max_tokens": 400})
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ASK | {"max_tokens": 400, "stream": True}) as answer:
            lines = [line[6:] for line in answer.iter_lines() if line]
        assert json.loads(lines[-1])["error"]["code"] == "timeout"
        assert len(lines) > 1  # the tokens before the timeout were sent


def test_a_stop_completes_running_answers_and_accepts_no_new_ones(engine: Engine) -> None:
    with serve_model(engine, pace=0.01) as server:
        got: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: got.append(post(server, ASK | {"max_tokens": 40})))
        thread.start()
        wait_for(lambda: server.scheduler.load == (1, 0))
        server.server.stop()
        refused = post(server, ASK)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert httpx.get(f"{server.url}/health").json()["status"] == "stopping"
        thread.join()
        assert got[0].json()["usage"]["completion_tokens"] == 40
        wait_for(lambda: not server.server.started or server.server.should_exit)


def test_a_long_answer_is_refused_when_the_grace_period_ends(engine: Engine) -> None:
    with serve_model(engine, limits=Limits(grace=0.1), pace=0.02) as server:
        got: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: got.append(post(server, ASK | {"max_tokens": 400})))
        thread.start()
        wait_for(lambda: server.scheduler.load == (1, 0))
        server.server.stop()
        thread.join()
        assert (got[0].status_code, got[0].json()["error"]["code"]) == (503, "stopping")


def test_an_engine_failure_gives_a_one_sentence_error_without_a_traceback(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_model(engine) as server:

        def broken(ids: Any, spans: Any) -> Any:
            raise ArithmeticError("secret detail")

        decoder = server.scheduler._decoder
        monkeypatch.setattr(server.scheduler, "_decoder", SimpleNamespace(forward=broken))
        refused = post(server, ASK)
        assert refused.status_code == 500
        assert "secret" not in refused.text
        assert "secret detail" in caplog.text
        monkeypatch.setattr(server.scheduler, "_decoder", decoder)
        assert post(server, ASK).status_code == 200


def test_a_slow_request_head_is_disconnected(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.inference.serve.limits.BODY_S", 0.1)
    with serve_model(engine) as server, server.raw() as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: lo")
        assert line.recv(100) == b""
        with server.raw() as other:
            other.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
            )
            assert other.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_is_canceled_after_a_timeout(engine: Engine) -> None:
    outputs = answer_alone(engine, [5, 6, 7], Sampling(), 3)
    canceled: list[Any] = []

    def submit(request: Any) -> None:
        for out in outputs:
            request.deliver(out)

    async def never_send(message: Any) -> None:
        await asyncio.sleep(60)

    async def never_receive() -> Any:
        await asyncio.sleep(60)

    async def respond() -> None:
        scheduler: Any = SimpleNamespace(submit=submit, cancel=canceled.append)
        under_way = Answer(scheduler, GenerationRequest(ids=[5, 6, 7], sampling=Sampling(), max_new_tokens=3, deliver=lambda out: None))
        under_way.begin()
        stream = EventStream(under_way, ResponseFormatter(chat=False, id="a", model="m"), None, timeout=0.05 - PATIENCE_S)
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, never_receive, never_send)

    asyncio.run(asyncio.wait_for(respond(), 5))
    assert canceled

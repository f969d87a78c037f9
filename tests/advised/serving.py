"""The advice of `fedtune serve`, to its operator and to its clients."""

import asyncio
import copy
import functools
import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.serve.app import create_app
from fedtune.inference.serve.limits import ApiKeys, Limits
from fedtune.inference.serve.served_model import ServedModel
from tests.advised.rows import ROWS, Place, Row, follows
from tests.inference.serve.servers import serve_model, tiny_model

ASK: dict[str, Any] = {"model": "tiny", "prompt": "turn on the light", "temperature": 0, "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 2}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
CALLS = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}


@functools.cache
def _load(folder: Path) -> Engine:
    return load_engine(folder)


def engine_of(place: Place) -> Engine:
    return _load(place.keep("served", lambda path: tiny_model(path, context=128)))


def engine_with_tools(place: Place) -> Engine:
    """The engine with a chat template that writes the tools into the prompt."""
    engine = copy.copy(engine_of(place))
    engine.text = copy.copy(engine.text)
    engine.text.template = "{{ tools }}" + str(engine.text.template)
    return engine


_JSON = {"Content-Type": "application/json"}


def refusal_of(answer: httpx.Response) -> str:
    """The sentence of a refusal; "" for an answer."""
    return answer.json()["error"]["message"] if answer.is_error else ""


def post(url: str, body: Any, **more: Any) -> str:
    path = "chat/completions" if "messages" in body else "completions"
    return refusal_of(httpx.post(f"{url}/v1/{path}", json=body, timeout=20, **more))


# -- one field too many -------------------------------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # sentence → the request, and the faulty fields to add to it
    "gives one answer per request: leave out 'n' or give 1": (CHAT, {"n": 2}),
    "gives one answer per request: leave out 'best_of' or give 1": (ASK, {"best_of": 2}),
    "does not support 'presence_penalty': leave it out; 'repetition_penalty' is supported": (CHAT, {"presence_penalty": 0.5}),
    "does not support 'frequency_penalty': leave it out; 'repetition_penalty' is supported": (ASK, {"frequency_penalty": 0.5}),
    "does not support 'logit_bias': leave it out": (ASK, {"logit_bias": {"5": 1}}),
    "does not repeat the prompt: leave out 'echo'": (ASK, {"echo": True}),
    "does not fill in the middle: leave out 'suffix'": (ASK, {"suffix": "on"}),
    "does not pad its streams: leave out 'include_obfuscation'": (
        ASK | {"stream": True},
        {"stream_options": {"include_obfuscation": True}},
    ),
    "does not support moderation: leave out 'moderation'": (CHAT, {"moderation": {"model": "x"}}),
    "does not support web search: leave out 'web_search_options'": (CHAT, {"web_search_options": {"x": 1}}),
    "the model's chat template ignores tools: leave out 'tools'": (CHAT, {"tools": [TOOL]}),
    "the model's chat template ignores tool calls: leave out 'tool_calls'": (CHAT, {"messages": [CALLS, *CHAT["messages"]]}),
    "does not constrain answers to a schema: leave out 'strict'": (CHAT, {"tools": [TOOL | {"function": {"name": "f", "strict": True}}]}),
    "does not force tool calls: give 'tool_choice' as auto or none, or leave it out": (CHAT, {"tool_choice": "required"}),
    "does not limit the number of tool calls: leave out 'parallel_tool_calls'": (CHAT, {"tools": [TOOL], "parallel_tool_calls": False}),
    "only a message of the assistant has tool calls: leave out 'tool_calls'": (
        CHAT,
        {"messages": [CHAT["messages"][0] | {"tool_calls": CALLS["tool_calls"]}]},
    ),
    "does not control reasoning or verbosity: leave out '{}'": (CHAT, {"verbosity": "high"}),
    "answers only in plain text: leave out '{}'": (CHAT, {"response_format": {"type": "json_object"}}),
    "has no field '{}': leave it out": (CHAT, {"color": "red"}),
    "'max_tokens' and 'max_completion_tokens' disagree: give one of them": (CHAT, {"max_completion_tokens": 3}),
}


def _without_field(body: dict[str, Any], field: str) -> dict[str, Any]:
    """The body without this field, wherever it is."""

    def strip(value: Any) -> Any:
        return [strip(v) for v in value] if isinstance(value, list) else _without_field(value, field) if isinstance(value, dict) else value

    return {name: strip(value) for name, value in body.items() if name != field}


def _field(right: dict[str, Any], wrong: dict[str, Any]) -> Any:
    def follow(place: Place) -> Iterator[str]:
        shows = wrong.get("parallel_tool_calls") is False or "strict" in str(wrong)
        with serve_model(engine_with_tools(place) if shows else engine_of(place)) as server:
            refusal = post(server.url, right | wrong)
            yield refusal
            named = re.findall(r"'(\w+)'", refusal.rpartition(": ")[2].partition(";")[0])
            for choice in ("auto", "none") if "as auto or none" in refusal else ():
                yield post(server.url, right | {"tool_choice": choice})
            for field in named or (wrong if "leave it" in refusal else [*wrong, "max_tokens"]):
                yield post(server.url, _without_field(right | wrong, field))
            if "give 1" in refusal:
                yield post(server.url, right | dict.fromkeys(wrong, 1))
            if "'repetition_penalty' is there" in refusal:
                yield post(server.url, right | {"repetition_penalty": 1.1})

    return follow


@follows("this model has no chat template, so it cannot use tools: leave out 'tools'")
def _(place: Place) -> Iterator[str]:
    engine = copy.copy(engine_of(place))
    engine.text = copy.copy(engine.text)
    engine.text.template = None
    with serve_model(engine, prompt="Request: {request}") as server:
        for more in ({"tools": [TOOL]}, {}):
            yield post(server.url, CHAT | more)


@follows("does not support '{}': use 'tools' and 'tool_calls'")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_with_tools(place)) as server:
        for more in ({"functions": [TOOL["function"]]}, {"tools": [TOOL]}):
            yield post(server.url, CHAT | more)


ROWS.extend(Row(sentence, _field(right, wrong)) for sentence, (right, wrong) in FIELDS.items())


@follows("does not support 'refusal': put its text into 'content'")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        first = CHAT["messages"]
        yield post(server.url, CHAT | {"messages": [*first, {"role": "assistant", "refusal": "no", "content": None}, *first]})
        yield post(server.url, CHAT | {"messages": [*first, {"role": "assistant", "content": "no"}, *first]})


@follows("does not support 'annotations': leave them out")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        message = CHAT["messages"][0]
        answer = {"role": "assistant", "content": "no"}
        yield post(server.url, CHAT | {"messages": [message, answer | {"annotations": [{"type": "url"}]}, message]})
        yield post(server.url, CHAT | {"messages": [message, answer, message]})


@follows("does not continue an assistant's message: end 'messages' with another role")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        begun = [*CHAT["messages"], {"role": "assistant", "content": "I"}]
        yield post(server.url, CHAT | {"messages": begun})
        yield post(server.url, CHAT | {"messages": [*begun, *CHAT["messages"]]})


@follows("'prompt' must be one string or one list of token ids: send more prompts as separate requests")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        yield post(server.url, ASK | {"prompt": ["turn on", "turn off"]})
        for prompt in ("turn on", "turn off"):
            yield post(server.url, ASK | {"prompt": prompt})


# -- too long, too many, not allowed ------------------------------------------------------------------------------------------------------


@follows("this server requires an API key: send 'Authorization: Bearer KEY'")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place), keys=("secret",)) as server:
        refusal = post(server.url, ASK)
        yield refusal
        name, value = re.findall(r"'(\w+): (.*)'", refusal)[0]
        yield post(server.url, ASK, headers={name: value.replace("KEY", "secret")})


@follows("this server accepts requests only for localhost: start it with an API key or another --host")
def _(place: Place) -> Iterator[str]:
    started: list[Any] = []
    place.patch.setattr("fedtune.inference.serve.server.Server.serve_on", lambda self, listener: started.append(self.config.app))
    engine_of(place)
    serve = ["fedtune", "serve", str(place.kept / "served"), "--port", "0"]
    (place.folder / "keys").write_text("secret")
    for flags in ([], ["--api-key-file", str(place.folder / "keys")], ["--host", "0.0.0.0"]):  # noqa: S104
        assert not place.run(*serve, *flags)
        yield refusal_of(_ask_app(started.pop(), headers={"Host": "device.example.org", "Authorization": "Bearer secret"}))


def _ask_app(app: Any, body: Any = None, **more: Any) -> httpx.Response:
    """The answer to a completion; without a body, the answer to GET /v1/models."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            if body is None:
                return await client.get("/v1/models", **more)
            return await client.post("/v1/completions", json=body, **more)

    return asyncio.run(ask())


@follows("the body is larger than {} bytes: shorten it or raise --max-body")
def _(place: Place) -> Iterator[str]:
    long = ASK | {"stop": ["x" * 390]}
    with serve_model(engine_of(place), limits=Limits(max_body=400, grace=5)) as server:
        yield post(server.url, long)
        yield post(server.url, ASK)
    with serve_model(engine_of(place), limits=Limits(max_body=800, grace=5)) as server:
        yield post(server.url, long)


@follows("the body must be JSON: send 'Content-Type: application/json'")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        refusal = refusal_of(httpx.post(f"{server.url}/v1/completions", content=json.dumps(ASK)))
        yield refusal
        name, value = re.findall(r"'([\w-]+): (.*)'", refusal)[0]
        yield refusal_of(httpx.post(f"{server.url}/v1/completions", content=json.dumps(ASK), headers={name: value}))


@follows("the body holds half a surrogate pair (\\ud800 to \\udfff): send whole characters")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        for prompt in ("turn \ud83d on", "turn \U0001f600 on"):
            yield refusal_of(httpx.post(f"{server.url}/v1/completions", content=json.dumps(ASK | {"prompt": prompt}), headers=_JSON))


@follows("the body did not arrive in time: send it without pauses")
def _(place: Place) -> Iterator[str]:
    body = json.dumps(ASK).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    place.patch.setattr("fedtune.inference.serve.limits.BODY_S", 0.2)
    with serve_model(engine_of(place)) as server:
        for parts in ((head.encode(), body[:5]), (head.encode() + body,)):
            with server.raw() as line:
                for part in parts:
                    line.sendall(part)
                answer = http.client.HTTPResponse(line)  # head and body arrive in separate packets
                answer.begin()
                body_of = answer.read().decode()
            yield "" if answer.status == 200 else body_of


@follows("there is no model of that name: use {}")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        refusal = post(server.url, ASK | {"model": "gpt"})
        yield refusal
        yield post(server.url, ASK | {"model": refusal.rpartition("use ")[2]})


@follows("characters are too many for {} tokens: shorten it")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        yield post(server.url, ASK | {"prompt": "light " * 5000})
        yield post(server.url, ASK | {"prompt": "light"})


@follows("tokens fill the model's context of {}: shorten it")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        yield post(server.url, ASK | {"prompt": [5] * 128})
        yield post(server.url, ASK | {"prompt": [5] * 100})


@follows("and {} new tokens exceed the model's context of {}: shorten one")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place)) as server:
        yield post(server.url, ASK | {"prompt": [5] * 127})
        yield post(server.url, ASK | {"prompt": [5] * 100})
        yield post(server.url, ASK | {"prompt": [5] * 127, "max_tokens": 1})


def _token_limit(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place), limits=Limits(max_tokens=4, grace=5)) as server:
        refusal = post(server.url, ASK | {"max_tokens": 9})
        yield refusal
        yield post(server.url, ASK | {"max_tokens": 4})
    most = re.findall(r"start it with --max-tokens (\d+)", refusal)[0]
    with serve_model(engine_of(place), limits=Limits(max_tokens=int(most), grace=5)) as server:
        yield post(server.url, ASK | {"max_tokens": 9})


follows("new tokens exceed this server's limit of {}: request fewer{}")(_token_limit)
follows(", or start it with --max-tokens {}")(_token_limit)


def _without_template(place: Place, prompt: str | None) -> Iterator[str]:
    engine = load_engine(place.keep("bare", lambda path: tiny_model(path, context=128, chat=False)))
    with serve_model(engine, prompt=prompt) as server:
        system = {"role": "system", "content": "be brief"}
        yield post(server.url, CHAT | {"messages": [system, *CHAT["messages"]]})
        yield post(server.url, ASK if prompt is None else CHAT)


@follows("this model has no chat template: use /v1/completions")
def _(place: Place) -> Iterator[str]:
    yield from _without_template(place, None)


@follows("this model was tuned on single requests: send one message of the role 'user'")
def _(place: Place) -> Iterator[str]:
    yield from _without_template(place, "Request: {x}\nAction:")


# -- temporary refusals -------------------------------------------------------------------------------------------------------------------


def _temporary_refusal(place: Place, **first: Any) -> Iterator[str]:
    """The error while the scheduler is in this state, then "" afterward."""
    plain: dict[str, Any] = {"cancel": lambda request: None, "full": False, "draining": False, "limit": 512, "load": (0, 0)}

    def submit(request: GenerationRequest) -> None:
        request.deliver(Output(" on", 5, end="length"))

    for changes in (first, {}):
        scheduler: Any = SimpleNamespace(**plain | {"submit": submit} | changes)
        app = create_app(scheduler, ServedModel(name="tiny", text=engine_of(place).text), Limits(), ApiKeys(), local=False)
        yield refusal_of(_ask_app(app, ASK))


def _end_with(how: str) -> Any:
    return lambda request: request.deliver(Output("", None, end=how))  # type: ignore[arg-type]


@follows("the server is shutting down: retry when it is back")
def _(place: Place) -> Iterator[str]:
    yield from _temporary_refusal(place, draining=True)


@follows("the queue is full: retry later")
def _(place: Place) -> Iterator[str]:
    yield from _temporary_refusal(place, full=True)


@follows("the answer took longer than this server allows: request fewer tokens")
def _(place: Place) -> Iterator[str]:
    with serve_model(engine_of(place), limits=Limits(timeout=0.4, grace=5), pace=0.05) as server:
        yield post(server.url, ASK | {"max_tokens": 60})
        yield post(server.url, ASK | {"max_tokens": 1})


@follows("the server shut down before the answer was complete: retry")
def _(place: Place) -> Iterator[str]:
    yield from _temporary_refusal(place, submit=_end_with("stopping"))


@follows("the queue of long prompts is full: retry later")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr("fedtune.inference.serve.prompts.LONG", 3)
    with serve_model(engine_of(place)) as server:
        place.patch.setattr("fedtune.inference.serve.prompts.LONG_WAITING", 0)  # as if the queue were full
        yield post(server.url, ASK)
        place.patch.setattr("fedtune.inference.serve.prompts.LONG_WAITING", 1)
        yield post(server.url, ASK)


@follows("the prompt waited longer than this server allows: retry later")
def _(place: Place) -> Iterator[str]:
    tokens, slow = ServedModel.tokens, [True]

    def late(self: ServedModel, asked: Any, context: int) -> list[int]:
        time.sleep(0.6 if slow else 0)
        return tokens(self, asked, context)

    place.patch.setattr(ServedModel, "tokens", late)
    with serve_model(engine_of(place), limits=Limits(timeout=0.4, grace=5)) as server:
        yield post(server.url, ASK)
        slow.clear()
        yield post(server.url, ASK)

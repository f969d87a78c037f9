"""Accepted requests, refusals with their sentences, and the format of answers."""

import json
from typing import Any, Required, get_origin, get_type_hints

import pytest
from openai.types import chat as openai_chat
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionParams

from fedtune.inference.serve.formats import ResponseFormatter, usage
from fedtune.inference.serve.logprobs import TokenLogprob
from fedtune.inference.serve.protocol import ChatMessage, ChatRequest, CompletionRequest, TextPart, read
from fedtune.inference.serve.refusal import Refused


def request_body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "a"} | more


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "a"}]} | more


@pytest.mark.parametrize(
    ("payload", "sentence", "param"),
    [
        ([], "the body must be a JSON object, but it is a list", None),
        (None, "but it is null", None),
        (3, "but it is a number", None),
        ({"prompt": "a"}, "the field 'model' is missing", "model"),
        ({"model": "m"}, "the field 'prompt' is missing", "prompt"),
        (request_body(model=""), "'model' is invalid: string should have at least 1 character", "model"),
        (request_body(prompt=["a", "b"]), "'prompt' must be one string or one list of token ids", "prompt"),
        (request_body(prompt=[]), "'prompt' must be one string", "prompt"),
        (request_body(prompt=[1, True]), "'prompt' must be one string", "prompt"),
        (request_body(prompt=[-1]), "'prompt' must be one string", "prompt"),
        (request_body(temperature=2.5), "'temperature' is invalid: input should be less than or equal to 2", "temperature"),
        (request_body(temperature="1"), "'temperature' is invalid: input should be a valid number", "temperature"),
        (request_body(temperature=True), "'temperature' is invalid: input should be a valid number", "temperature"),
        (request_body(temperature=5e-324), "'temperature' must be 0 (greedy) or at least 0.001", "temperature"),
        (
            request_body(repetition_penalty=5e-324),
            "'repetition_penalty' is invalid: input should be greater than or equal to 0.01",
            "repetition_penalty",
        ),
        (request_body(top_p=-0.1), "'top_p' is invalid: input should be greater than or equal to 0", "top_p"),
        (request_body(seed=2**64), "'seed' is invalid", "seed"),
        (request_body(seed=1.5), "'seed' is invalid", "seed"),
        (request_body(max_tokens=0), "'max_tokens' is invalid: input should be greater than or equal to 1", "max_tokens"),
        (request_body(max_tokens=10**40), "'max_tokens' is invalid", "max_tokens"),
        (request_body(stop=["a", 1]), "'stop' must be a string or a list of at most 16 strings, none of them empty", "stop"),
        (request_body(stop=""), "'stop' must be a string", "stop"),
        (request_body(stop=["x"] * 17), "'stop' must be a string", "stop"),
        (request_body(stream="yes"), "'stream' is invalid: input should be a valid boolean", "stream"),
        (request_body(stream_options={"include_usage": True}), "'stream_options' needs 'stream': true", None),
        (request_body(stream=True, stream_options={"x": 1}), "this server has no field 'x'", "x"),
        (request_body(n=2), "one answer per request: leave out 'n'", "n"),
        (request_body(best_of=3), "one answer per request: leave out 'best_of'", "best_of"),
        (request_body(echo=True), "does not repeat the prompt", "echo"),
        (request_body(suffix="z"), "does not fill in the middle", "suffix"),
        (request_body(logit_bias={"1": 5}), "does not support 'logit_bias'", "logit_bias"),
        (request_body(presence_penalty=0.5), "does not support 'presence_penalty'", "presence_penalty"),
        (request_body(frequency_penalty=-1), "does not support 'frequency_penalty'", "frequency_penalty"),
        (request_body(logprobs=21), "'logprobs' is invalid", "logprobs"),
        (request_body(color="red"), "this server has no field 'color': leave it out", "color"),
        (request_body(temprature=None), "this server has no field 'temprature': leave it out", "temprature"),
        (request_body(prompt=None), "'prompt' must be one string", "prompt"),
        (request_body(model=None), "'model' is invalid: input should be a valid string", "model"),
        (
            request_body(stream=True, stream_options={"include_obfuscation": True}),
            "does not pad its streams: leave out 'include_obfuscation'",
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_invalid_completions_give_a_one_sentence_error(payload: Any, sentence: str, param: str | None) -> None:
    with pytest.raises(Refused) as refused:
        read(CompletionRequest, payload)
    error = refused.value.body()["error"]
    assert sentence in error["message"]
    assert "\n" not in error["message"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (chat(messages=[]), "'messages' is invalid: list should have at least 1 item"),
        (chat(messages="hello"), "'messages' is invalid: input should be a valid list"),
        (chat(messages=[{"role": "critic", "content": "a"}]), "'messages[0].role' is invalid: input should be 'system'"),
        (chat(messages=[{"role": "user"}]), "the field 'messages[0].content' is missing"),
        (chat(messages=[{"role": "user", "content": None}]), "'messages[0].content' is invalid"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "'messages[0].content[0].t"),
        (chat(top_logprobs=2), "'top_logprobs' needs 'logprobs': true"),
        (chat(max_tokens=3, max_completion_tokens=4), "disagree: give one of them"),
        (chat(response_format={"type": "json_object"}), "answers only in plain text"),
        (chat(modalities=["audio"]), "answers only in plain text"),
        (chat(prompt="a"), "has no field 'prompt'"),
        (chat(messages=None), "'messages' is invalid"),
        (chat(messages=[{"role": None, "content": "a"}]), "'messages[0].role' is invalid"),
        (chat(messages=[{"role": "user", "content": "a", "nmae": None}]), "has no field 'nmae'"),
        (chat(messages=[{"role": "user", "content": [{"type": "text", "text": None}]}]), "'messages[0].content[0].text' is invalid"),
        (chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}]), "the field 'messages[0].tool_calls[0].function' is missing"),
        (chat(messages=[{"role": "assistant", "content": None, "function_call": {}}]), "does not support 'function_call': use 'tools' and"),
        (chat(messages=[{"role": "assistant", "content": None, "refusal": "no"}]), "'refusal': put its text into 'content'"),
        (chat(messages=[{"role": "assistant", "content": "a", "audio": {"id": "1"}}]), "only in plain text: leave out 'audio'"),
        (
            chat(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
            "does not continue an assistant's message: end 'messages' with another role",
        ),
        (chat(functions=[{"name": "f"}]), "does not support 'functions': use 'tools' and 'tool_calls'"),
        (chat(tool_choice="required"), "does not force tool calls: give 'tool_choice' as auto or none"),
        (chat(reasoning_effort="high"), "leave out 'reasoning_effort'"),
        (chat(verbosity="low"), "leave out 'verbosity'"),
        (chat(web_search_options={}), "does not support web search"),
        (chat(moderation={"model": "m"}), "does not support moderation"),
    ],
)
def test_invalid_chats_give_a_one_sentence_error(payload: Any, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        read(ChatRequest, payload)
    assert sentence in refused.value.message


def test_fields_without_an_effect_are_accepted() -> None:
    harmless: dict[str, Any] = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "u", "stop": None}
    assert read(CompletionRequest, request_body(**harmless, best_of=1, echo=False, suffix=None)).stops == ()
    assert read(ChatRequest, chat(**harmless, tools=[], response_format={"type": "text"}, store=False)).limit is None


@pytest.mark.parametrize(
    "neutral",
    [
        *(
            {"tools": []},
            {"functions": []},
            {"tool_choice": "none"},
            {"tool_choice": "auto"},
            {"function_call": "none"},
            {"top_logprobs": 0},
        ),
        *({"parallel_tool_calls": True}, {"parallel_tool_calls": False}, {"reasoning_effort": "none"}, {"verbosity": "medium"}),
        *({"logprobs": False}, {"modalities": ["text"]}, {"response_format": {"type": "text"}}, {"service_tier": "auto"}, {"stop": []}),
        *({"prediction": {"type": "content", "content": "a"}}, {"prompt_cache_retention": "24h"}, {"prompt_cache_options": {"ttl": "30m"}}),
    ],
)
def test_a_chat_field_without_effect_is_accepted(neutral: dict[str, Any]) -> None:
    one, two = read(ChatRequest, chat(**neutral)), read(ChatRequest, chat())
    assert (one.stops, one.limit, one.tops, one.messages) == (two.stops, two.limit, two.tops, two.messages)


def optional(kind: Any) -> list[str]:
    """Names of a typed dictionary of the openai package that a caller may leave out."""
    return [name for name, hint in get_type_hints(kind, include_extras=True).items() if get_origin(hint) is not Required]


@pytest.mark.parametrize(
    ("ours", "theirs", "good"), [(ChatRequest, ChatParams, chat()), (CompletionRequest, CompletionParams, request_body())]
)
def test_every_optional_field_of_a_request_may_be_null(ours: Any, theirs: Any, good: dict[str, Any]) -> None:
    names = {*optional(theirs), *(name for name, field in ours.model_fields.items() if not field.is_required())}
    assert len(names) > 15
    for name in names:
        assert read(ours, good | {name: None}) == read(ours, good), name
    assert read(ours, good | dict.fromkeys(names)) == read(ours, good)


def test_every_optional_field_within_a_request_may_be_null() -> None:
    options: dict[str, None] = dict.fromkeys(optional(openai_chat.ChatCompletionStreamOptionsParam))
    assert len(options) >= 2
    assert not read(ChatRequest, chat(stream=True, stream_options=options)).wants_usage
    parts: dict[str, None] = dict.fromkeys([*optional(openai_chat.ChatCompletionContentPartTextParam), *optional_of(TextPart)])
    kinds = {
        "system": openai_chat.ChatCompletionSystemMessageParam,
        "developer": openai_chat.ChatCompletionDeveloperMessageParam,
        "assistant": openai_chat.ChatCompletionAssistantMessageParam,
        "user": openai_chat.ChatCompletionUserMessageParam,
    }
    last = {"role": "user", "content": "a"}
    for role, kind in kinds.items():
        message = {"role": role, "content": [{"type": "text", "text": "b"} | parts]} | dict.fromkeys(
            name for name in [*optional(kind), *optional_of(ChatMessage)] if name != "content"
        )
        assert read(ChatRequest, chat(messages=[message, last])).messages[0].plain()["content"] == "b"
    for empty in ({"role": "assistant"}, {"role": "assistant", "content": None, "tool_calls": [], "annotations": [], "refusal": ""}):
        assert read(ChatRequest, chat(messages=[empty, last])).messages[0].plain() == {"role": "assistant", "content": ""}


def optional_of(kind: Any) -> list[str]:
    return [name for name, field in kind.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("text", ["", " ", "a\n", "naïve 😀 \ufffd", "{{ x }}</s>\x00"])
def test_an_answer_is_accepted_as_a_message(text: str) -> None:
    whole = json.loads(json.dumps(ResponseFormatter(chat=True, id="c", model="m").whole(text, None, "stop", usage(1, 1))))
    message = whole["choices"][0]["message"]
    parsed = openai_chat.ChatCompletion.model_validate(whole).choices[0].message
    streamed = {"role": "assistant", "content": ""}
    for event in events([*(shape := ResponseFormatter(chat=True, id="c", model="m")).opening(), shape.piece(text, None)]):
        streamed |= {"content": streamed["content"] + event["choices"][0]["delta"]["content"]}
    for form in (message, parsed.model_dump(), parsed.model_dump(exclude_unset=True), streamed):
        read_back = read(ChatRequest, chat(messages=[{"role": "user", "content": "a"}, form, {"role": "user", "content": "b"}]))
        assert read_back.messages[1].plain() == {"role": "assistant", "content": text}


def test_fields_are_parsed() -> None:
    one = read(
        CompletionRequest,
        request_body(prompt=["b"], stop="x", max_tokens=5, logprobs=0, stream=True, stream_options={"include_usage": True}),
    )
    assert (one.prompt, one.stops, one.limit, one.tops, one.wants_usage) == ("b", ("x",), 5, 0, True)
    assert read(CompletionRequest, request_body(prompt=[4, 5])).prompt == [4, 5]
    two = read(ChatRequest, chat(max_completion_tokens=7, logprobs=True, stop=["x", "y"]))
    assert (two.limit, two.tops, two.stops, two.wants_usage) == (7, 0, ("x", "y"), False)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    three = read(ChatRequest, chat(messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]))
    assert [m.plain() for m in three.messages] == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]


def events(chunks: list[bytes]) -> list[Any]:
    lines = [line for line in b"".join(chunks).decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]) for line in lines]


def test_a_completion_stream() -> None:
    shape = ResponseFormatter(chat=False, id="cmpl-1", model="m", created=7, usage_in_stream=True)
    logprobs = [TokenLogprob("héé", -0.5, "héé".encode(), (TokenLogprob("héé", -0.5, "héé".encode()), TokenLogprob("x", -1.0, b"x")))]
    got = events([*shape.opening(), shape.piece("héé", logprobs), shape.piece("\n", logprobs), *shape.closing("stop", usage(3, 2))])
    assert [c if c == "[DONE]" else [choice["text"] for choice in c["choices"]] for c in got] == [["héé"], ["\n"], [""], [], "[DONE]"]
    assert [c["choices"][0]["finish_reason"] for c in got[:3]] == [None, None, "stop"]
    assert [c["usage"] for c in got[:4]] == [None, None, None, usage(3, 2)]
    assert got[3]["usage"]["total_tokens"] == 5
    assert got[0]["choices"][0]["logprobs"]["top_logprobs"] == [{"héé": -0.5, "x": -1.0}]
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in got[:2]] == [[0], [3]]
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in got[:4]} == {("cmpl-1", "text_completion", 7, "m")}


def test_the_format_of_a_chat_stream_and_of_a_complete_chat() -> None:
    shape = ResponseFormatter(chat=True, id="c", model="m")
    got = events([*shape.opening(), shape.piece("a", [TokenLogprob("a", -1.0, b"a")]), *shape.closing("length", usage(1, 1))])
    assert [c["choices"][0]["delta"] for c in got[:3]] == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    assert "usage" not in got[0]
    assert got[1]["choices"][0]["logprobs"]["content"] == [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}]
    whole = shape.whole("abc", None, "stop", usage(1, 3, cached=1))
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_a_refusal_says_when_to_retry() -> None:
    refused = Refused(429, "full", code="queue_full", retry_after=2)
    assert refused.headers() == {"Retry-After": "2"}
    assert refused.body() == {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}}

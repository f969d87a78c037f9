"""What may be asked, what is refused and by which sentence, and the shapes of answers."""

import json
from typing import Any

import pytest

from fedtune.inference.serve.protocol import AskedChat, AskedCompletion, Refused, Shape, TokenLogprob, read, usage


def asked(**more: Any) -> dict[str, Any]:
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
        (asked(model=""), "'model' is wrong: string should have at least 1 character", "model"),
        (asked(prompt=["a", "b"]), "'prompt' must be one text or one list of token ids", "prompt"),
        (asked(prompt=[]), "'prompt' must be one text", "prompt"),
        (asked(prompt=[1, True]), "'prompt' must be one text", "prompt"),
        (asked(prompt=[-1]), "'prompt' must be one text", "prompt"),
        (asked(temperature=2.5), "'temperature' is wrong: input should be less than or equal to 2", "temperature"),
        (asked(temperature="1"), "'temperature' is wrong: input should be a valid number", "temperature"),
        (asked(temperature=True), "'temperature' is wrong: input should be a valid number", "temperature"),
        (asked(temperature=5e-324), "'temperature' must be 0, which is greedy, or at least 0.001", "temperature"),
        (
            asked(repetition_penalty=5e-324),
            "'repetition_penalty' is wrong: input should be greater than or equal to 0.01",
            "repetition_penalty",
        ),
        (asked(top_p=0), "'top_p' is wrong: input should be greater than 0", "top_p"),
        (asked(seed=2**64), "'seed' is wrong", "seed"),
        (asked(seed=1.5), "'seed' is wrong", "seed"),
        (asked(max_tokens=0), "'max_tokens' is wrong: input should be greater than or equal to 1", "max_tokens"),
        (asked(max_tokens=10**40), "'max_tokens' is wrong", "max_tokens"),
        (asked(stop=["a", 1]), "'stop' must be one text or at most 16, none of them empty", "stop"),
        (asked(stop=""), "'stop' must be one text", "stop"),
        (asked(stop=["x"] * 17), "'stop' must be one text", "stop"),
        (asked(stream="yes"), "'stream' is wrong: input should be a valid boolean", "stream"),
        (asked(stream_options={"include_usage": True}), "'stream_options' needs 'stream': true", None),
        (asked(stream=True, stream_options={"x": 1}), "this server knows no field 'x'", "x"),
        (asked(n=2), "one answer a request: leave out 'n'", "n"),
        (asked(best_of=3), "one answer a request: leave out 'best_of'", "best_of"),
        (asked(echo=True), "does not repeat the prompt", "echo"),
        (asked(suffix="z"), "does not fill in the middle", "suffix"),
        (asked(logit_bias={"1": 5}), "takes no 'logit_bias'", "logit_bias"),
        (asked(presence_penalty=0.5), "no presence penalty", "presence_penalty"),
        (asked(frequency_penalty=-1), "no frequency penalty", "frequency_penalty"),
        (asked(logprobs=21), "'logprobs' is wrong", "logprobs"),
        (asked(colour="red"), "this server knows no field 'colour': leave it out", "colour"),
    ],
)
def test_completions_are_refused_by_one_sentence(payload: Any, sentence: str, param: str | None) -> None:
    with pytest.raises(Refused) as refused:
        read(AskedCompletion, payload)
    error = refused.value.body()["error"]
    assert sentence in error["message"]
    assert "\n" not in error["message"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (chat(messages=[]), "'messages' is wrong: list should have at least 1 item"),
        (chat(messages="hello"), "'messages' is wrong: input should be a valid list"),
        (chat(messages=[{"role": "tool", "content": "a"}]), "'messages[0].role' is wrong: input should be 'system'"),
        (chat(messages=[{"role": "user"}]), "the field 'messages[0].content' is missing"),
        (chat(messages=[{"role": "user", "content": None}]), "'messages[0].content' is wrong"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "'messages[0].content[0].t"),
        (chat(top_logprobs=2), "'top_logprobs' needs 'logprobs': true"),
        (chat(max_tokens=3, max_completion_tokens=4), "disagree: give one of them"),
        (chat(tools=[{"type": "function"}]), "calls no tools"),
        (chat(response_format={"type": "json_object"}), "answers in plain text alone"),
        (chat(modalities=["audio"]), "answers in plain text alone"),
        (chat(prompt="a"), "knows no field 'prompt'"),
    ],
)
def test_chats_are_refused_by_one_sentence(payload: Any, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        read(AskedChat, payload)
    assert sentence in refused.value.message


def test_what_changes_nothing_is_taken() -> None:
    harmless: dict[str, Any] = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "u", "stop": None}
    assert read(AskedCompletion, asked(**harmless, best_of=1, echo=False, suffix=None)).stops == ()
    assert read(AskedChat, chat(**harmless, tools=[], response_format={"type": "text"}, store=False)).limit is None


def test_fields_arrive() -> None:
    one = read(
        AskedCompletion, asked(prompt=["b"], stop="x", max_tokens=5, logprobs=0, stream=True, stream_options={"include_usage": True})
    )
    assert (one.prompt, one.stops, one.limit, one.tops, one.wants_usage) == ("b", ("x",), 5, 0, True)
    assert read(AskedCompletion, asked(prompt=[4, 5])).prompt == [4, 5]
    two = read(AskedChat, chat(max_completion_tokens=7, logprobs=True, stop=["x", "y"]))
    assert (two.limit, two.tops, two.stops, two.wants_usage) == (7, 0, ("x", "y"), False)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    three = read(AskedChat, chat(messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]))
    assert [m.plain() for m in three.messages] == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]


def events(chunks: list[bytes]) -> list[Any]:
    lines = [line for line in b"".join(chunks).decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]) for line in lines]


def test_a_completion_stream() -> None:
    shape = Shape(chat=False, id="cmpl-1", model="m", made=7, usage_in_stream=True)
    told = [TokenLogprob("héé", -0.5, (("héé", -0.5), ("x", -1.0)))]
    got = events([*shape.opening(), shape.piece("héé", told), shape.piece("\n", told), *shape.closing("stop", usage(3, 2))])
    assert [c if c == "[DONE]" else [choice["text"] for choice in c["choices"]] for c in got] == [["héé"], ["\n"], [""], [], "[DONE]"]
    assert [c["choices"][0]["finish_reason"] for c in got[:3]] == [None, None, "stop"]
    assert [c["usage"] for c in got[:4]] == [None, None, None, usage(3, 2)]
    assert got[3]["usage"]["total_tokens"] == 5
    assert got[0]["choices"][0]["logprobs"]["top_logprobs"] == [{"héé": -0.5, "x": -1.0}]
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in got[:2]] == [[0], [3]]
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in got[:4]} == {("cmpl-1", "text_completion", 7, "m")}


def test_a_chat_stream_and_a_whole_chat() -> None:
    shape = Shape(chat=True, id="c", model="m")
    got = events([*shape.opening(), shape.piece("a", [TokenLogprob("a", -1.0)]), *shape.closing("length", usage(1, 1))])
    assert [c["choices"][0]["delta"] for c in got[:3]] == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    assert "usage" not in got[0]
    assert got[1]["choices"][0]["logprobs"]["content"] == [{"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}]
    whole = shape.whole("abc", None, "stop", usage(1, 3, cached=1))
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_a_refusal_says_when_to_come_back() -> None:
    refused = Refused(429, "full", code="queue_full", retry_after=2)
    assert refused.headers() == {"Retry-After": "2"}
    assert refused.body() == {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}}

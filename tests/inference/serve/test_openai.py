"""The real `openai` client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.sample import Sampling
from tests.inference.serve.servers import Served, answer_alone, serve_model, text_of


@pytest.fixture(scope="module")
def here(engine: Engine) -> Iterator[Served]:
    with serve_model(engine, keys=("secret",)) as server:
        yield server


@pytest.fixture(scope="module")
def client(here: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{here.url}/v1", api_key="secret", max_retries=0) as openai_client:
        yield openai_client


def test_the_served_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fedtune"


def test_completions_equal_the_scheduler_s_answer(here: Served, client: openai.OpenAI) -> None:
    ids = here.engine.text.encode("turn on")
    answer = client.completions.create(model="tiny", prompt="turn on", temperature=0, max_tokens=8, logprobs=2)
    outputs = answer_alone(here.engine, ids, Sampling(), 8, rivals=2, joins=True)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (text_of(outputs), "length")
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx([out.logprob for out in outputs])
    assert [len(rivals) for rivals in choice.logprobs.top_logprobs or []] == [2] * 8
    stream = client.completions.create(
        model="tiny", prompt="turn on", temperature=0, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text
    assert chunks[-1].usage == answer.usage


def test_chats_equal_the_scheduler_s_answer(here: Served, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    ids = here.engine.text.encode("user: hello\nassistant:", begin=False)
    wanted = text_of(answer_alone(here.engine, ids, Sampling(temperature=0.9, top_p=0.8, seed=7), 10)).lstrip()
    ask = {"model": "tiny", "messages": messages, "temperature": 0.9, "top_p": 0.8, "seed": 7, "max_completion_tokens": 10}
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=1)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 1 for token in answer.choices[0].logprobs.content)
    chunks = list(client.chat.completions.create(**ask, stream=True))  # type: ignore[arg-type]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_answers_are_accepted_as_messages_in_every_form_of_the_client(here: Served, client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    first: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(messages=first, **ask)
    raw = client.chat.completions.with_raw_response.create(messages=first, **ask)
    stop = answer.choices[0].message.content[1:3]  # the helper raises where an answer is cut by its length
    with client.chat.completions.stream(messages=first, stop=stop, **ask) as stream:
        streamed = stream.get_final_completion().choices[0].message
    message = answer.choices[0].message
    forms = [message, message.model_dump(), message.to_dict(), json.loads(raw.text)["choices"][0]["message"], streamed]
    for form in forms:
        again = client.chat.completions.create(messages=[*first, form, *first], **ask)
        content = streamed.content if form is streamed else message.content
        prompt = f"user: hello\nassistant: {content}\nuser: hello\nassistant:"
        assert again.usage.prompt_tokens == len(here.engine.text.encode(prompt, begin=False))
    plain = client.completions.create(prompt="hello", **ask)
    assert client.completions.create(prompt="hello" + plain.choices[0].text, **ask).choices[0].finish_reason == "length"


def test_top_p_of_zero_leaves_the_likeliest_token(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "prompt": "warm", "max_tokens": 12}
    greedy = client.completions.create(temperature=0, **ask).choices[0].text
    assert [client.completions.create(temperature=1.5, top_p=0, **ask).choices[0].text for _ in range(2)] == [greedy, greedy]


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 1, "seed": 4, "max_tokens": 20}
    plain = client.chat.completions.create(**ask).choices[0].message.content or ""  # type: ignore[arg-type]
    ask["stop"] = plain[6:9]  # the helper raises where an answer is cut by its length
    with client.chat.completions.stream(**ask) as stream:  # type: ignore[arg-type]
        parts = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0].message.content
    assert "".join(parts) == final == plain[: plain.index(plain[6:9])]


def test_a_stop_string_ends_the_answer(here: Served, client: openai.OpenAI) -> None:
    plain = text_of(answer_alone(here.engine, here.engine.text.encode("warm"), Sampling(temperature=1.0, seed=3), 20, joins=True))
    stop = plain[5:8]
    choice = client.completions.create(model="tiny", prompt="warm", temperature=1, seed=3, max_tokens=20, stop=[stop, "~~"]).choices[0]
    assert (choice.text, choice.finish_reason) == (plain[: plain.index(stop)], "stop")


def test_other_sampling_settings_are_extra_fields(here: Served, client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2}
    choice = client.completions.create(model="tiny", prompt="warm", temperature=1, seed=3, max_tokens=9, extra_body=extra).choices[0]
    way = Sampling(temperature=1.0, seed=3, top_k=5, min_p=0.01, repetition_penalty=1.2)
    assert choice.text == text_of(answer_alone(here.engine, here.engine.text.encode("warm"), way, 9, joins=True))


def test_refusals_are_the_clients_own_errors(here: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model of that name"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="one answer per request") as bad:
        client.completions.create(model="tiny", prompt="a", n=2)
    assert (bad.value.param, bad.value.code, bad.value.type) == ("n", "unsupported_parameter", "invalid_request_error")
    with pytest.raises(openai.AuthenticationError, match="requires an API key"):
        openai.OpenAI(base_url=f"{here.url}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.slow
def test_a_full_queue_is_a_rate_limit_and_the_client_retries(engine: Engine) -> None:
    with serve_model(engine, max_running=1, max_waiting=0, pace=0.01) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client.completions.create(model="tiny", prompt="a", max_tokens=400, stream=True) as first:
            next(iter(first))
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(model="tiny", prompt="a")
            assert full.value.response.headers["retry-after"] == "1"
        patient = client.with_options(max_retries=3)
        assert patient.completions.create(model="tiny", prompt="a", max_tokens=2).usage is not None


def test_an_error_within_a_stream_is_raised(engine: Engine) -> None:
    from fedtune.inference.serve.limits import Limits

    with serve_model(engine, limits=Limits(timeout=0.1, grace=1), pace=0.02) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="took longer"):
            list(client.completions.create(model="tiny", prompt="a", max_tokens=400, stream=True))

"""Tools: their schemas reach the chat template, and calls are read from answers in the form of Hermes and Qwen models."""

import asyncio
import copy
import json
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.serve.app import create_app
from fedtune.inference.serve.limits import ApiKeys, Limits
from fedtune.inference.serve.protocol import ChatRequest, read
from fedtune.inference.serve.refusal import Refused
from fedtune.inference.serve.served_model import ServedModel
from fedtune.inference.serve.tools import CallReader

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson + '\\n' }}{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\\n' }}{% endfor %}assistant:"
)
TOOL = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}}
USER = {"role": "user", "content": "Italy?"}
CALL = '<tool_call>\n{"name": "capital", "arguments": {"of": "Italy"}}\n</tool_call>'
ITALY = ("capital", {"of": "Italy"})


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("Rome.", "Rome.", []),
        (CALL, "", [ITALY]),
        (f"I look.\n\n{CALL}", "I look.", [ITALY]),
        (f"{CALL}\n{CALL.replace('Italy', 'Pérou')}\n", "", [ITALY, ("capital", {"of": "Pérou"})]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
        ("a <tool b <", "a <tool b <", []),
        *((odd, odd, []) for odd in (
            f"{CALL} and more", CALL[:-1], CALL.replace("}}", "}"), CALL.replace("{", "[", 1), f"{CALL}<tool_call>",
            "<tool_call></tool_call>", CALL.replace('"capital"', "5"), CALL.replace('{"of": "Italy"}', '"Italy"'), "\n text \n",
        )),
    ],
)  # fmt: skip
def test_calls_are_read_and_everything_else_is_text(answer: str, text: str, calls: list[Any]) -> None:
    for size in (1, 3, 7, len(answer)):
        reader = CallReader()
        shown = "".join(reader.push(answer[i : i + size]) for i in range(0, len(answer), size))
        rest, found = reader.finish()
        assert shown + rest == text
        assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found] == calls
        assert len({call["id"] for call in found}) == len(found)


def ask(engine: Engine, pieces: list[str], template: str | None = TEMPLATE, **more: Any) -> tuple[str, Any]:
    """The prompt that the model gets, and the openai client's answer where the model writes `pieces`."""
    prompts: list[str] = []

    def submit(request: GenerationRequest) -> None:
        prompts.append(text.decode(request.ids))
        for i, piece in enumerate(pieces):
            request.deliver(Output(piece, 5, end="stop" if i == len(pieces) - 1 else None))

    text = copy.copy(engine.text)
    text.template = template
    scheduler: Any = SimpleNamespace(submit=submit, cancel=lambda request: None, full=False, draining=False, limit=512)
    served = ServedModel(name="tiny", text=text, prompt="{request}" if template is None else None)
    app = create_app(scheduler, served, Limits(), ApiKeys(), local=False)

    here: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app))

    async def get_answer() -> Any:
        async with openai.AsyncOpenAI(base_url="http://here/v1", api_key="-", max_retries=0, http_client=here) as client:
            found = await client.chat.completions.create(**{"model": "tiny", "messages": [USER]} | more)  # type: ignore[call-overload]
            return [chunk async for chunk in found] if more.get("stream") else found

    answer = asyncio.run(get_answer())
    return "".join(prompts), answer


def test_the_schemas_reach_the_template_unless_none_may_be_called(engine: Engine) -> None:
    for choice in ({}, {"tool_choice": "auto"}):
        prompt, _ = ask(engine, ["Rome."], tools=[TOOL], **choice)
        assert prompt == f"{json.dumps(TOOL)}\nuser: Italy?\nassistant:"
    prompt, answer = ask(engine, [CALL], tools=[TOOL], tool_choice="none")
    assert prompt == "user: Italy?\nassistant:" and answer.choices[0].message.content == CALL


def test_a_call_is_answered_and_can_be_sent_back(engine: Engine) -> None:
    _, answer = ask(engine, ["I look.", "\n", CALL[:9], CALL[9:]], tools=[TOOL])
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", "I look.", "capital")
    back = [USER, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Rome"}]
    prompt, answer = ask(engine, ["Rome."], tools=[TOOL], messages=back)
    called = '<tool_call>{"name": "capital", "arguments": {"of": "Italy"}}</tool_call>'
    assert prompt == f"{json.dumps(TOOL)}\nuser: Italy?\nassistant: I look.{called}\ntool: Rome\nassistant:"
    assert answer.choices[0].message.content == "Rome." and answer.choices[0].finish_reason == "stop"


def test_a_call_is_streamed_whole(engine: Engine) -> None:
    _, chunks = ask(engine, ["I look.", "\n", CALL[:9], CALL[9:]], tools=[TOOL], stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    (call,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert (call.index, call.type, call.function.name, json.loads(call.function.arguments)) == (0, "function", *ITALY)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    _, chunks = ask(engine, ["a ", "<tool", "_call> b"], tools=[TOOL], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a <tool_call> b"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_other_models_answer_in_text(engine: Engine) -> None:
    template = TEMPLATE.replace("<tool_call>", "[CALL]")
    _, answer = ask(engine, [CALL], template, tools=[TOOL])
    assert answer.choices[0].message.content == CALL and answer.choices[0].message.tool_calls is None


SAYS = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "more", "sentence"),
    [
        (PLAIN, {"tools": [TOOL]}, "the model's chat template ignores tools: leave out 'tools'"),
        (PLAIN, {"messages": [USER, SAYS, USER]}, "the model's chat template ignores tool calls: leave out 'tool_calls'"),
        (None, {"tools": [TOOL]}, "this model has no chat template, so it cannot use tools: leave out 'tools'"),
    ],
)
def test_tools_that_the_template_ignores_are_refused(engine: Engine, template: str | None, more: Any, sentence: str) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask(engine, ["Rome."], template, **more)


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **more}


def call_of(**function: Any) -> dict[str, Any]:
    return {"messages": [USER, {**SAYS, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"} | function}]}, USER]}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"tools": [TOOL] * 129}, "the field 'tools' is invalid: list should have at most 128 items"),
        ({"tools": [{"type": "web"}]}, "the field 'tools[0].type' is invalid: input should be 'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "the field 'tools[0].function.name' is invalid"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "does not constrain answers to a schema: leave out"),
        ({"tools": [TOOL], "tool_choice": "required"}, "this server does not force tool calls: give 'tool_choice' as auto or none"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "capital"}}}, "does not force tool calls"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "does not limit the number of tool calls: leave out 'parallel_tool_calls'"),
        (call_of(arguments="[]"), "the 'arguments' of a tool call must be the JSON text of an object"),
        (call_of(arguments="{"), "the 'arguments' of a tool call must be the JSON text of an object"),
        ({"messages": [{**USER, "tool_calls": SAYS["tool_calls"]}]}, "message of the assistant has tool calls: leave out 'tool_calls'"),
        ({"messages": [USER, SAYS, {"role": "tool", "content": "Rome"}]}, "'tool_call_id' belongs to a message of the role 'tool'"),
        ({"messages": [{**USER, "tool_call_id": "1"}]}, "'tool_call_id' belongs to a message of the role 'tool'"),
    ],
)
def test_invalid_tools_give_a_one_sentence_error(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        read(ChatRequest, body(**more))
    assert sentence in refused.value.message


def test_schemas_and_calls_count_as_characters_of_the_prompt() -> None:
    assert read(ChatRequest, body()).characters == len("Italy?")
    assert read(ChatRequest, body(tools=[TOOL])).characters == len("Italy?") + len(json.dumps([TOOL]))
    assert read(ChatRequest, body(tools=[TOOL], tool_choice="none")).characters == len("Italy?")
    assert read(ChatRequest, body(**call_of(arguments='{"a": 1}'))).characters == 2 * len("Italy?") + 8
    schema = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"default": None, "enum": [None, 1]}}}}}
    assert read(ChatRequest, body(tools=[schema])).schemas == [schema]

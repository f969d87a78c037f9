"""Requests of OpenAI's `/v1/completions` and `/v1/chat/completions`.

An unsupported field that would change the answer is refused with an error, never ignored.
Values without effect are accepted, and so are bookkeeping fields (`user`, `metadata`, `store` …).
Every optional field may be null, and every answer can be sent back as a message.

Source: OpenAI API reference, "Completions" and "Chat".
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fedtune.inference.serve.objects import Object
from fedtune.inference.serve.refusal import Refused
from fedtune.inference.serve.tools import Tool, ToolCall

INT64 = 2**63 - 1
STOPS = 16
TOOLS = 128  # as in OpenAI's API
MIN_TEMPERATURE = 1e-3  # logits divided by much less overflow


class StreamOptions(Object):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Request(Object):
    """Fields of both routes."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64)] | None = None
    stop: str | list[str] | None = None
    # extensions of OpenAI's API, named as in vLLM, llama.cpp and transformers
    top_k: Annotated[int, Field(ge=0, le=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    # only one value of each is supported
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # bookkeeping
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    prediction: Any = None  # a guess at the answer, which only affects speed

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, stop: Any) -> Any:
        texts = stop if isinstance(stop, list) else [stop]
        if stop is not None and (len(texts) > STOPS or not all(isinstance(text, str) and text for text in texts)):
            raise ValueError(f"'stop' must be a string or a list of at most {STOPS} strings, none of them empty")
        return stop

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < MIN_TEMPERATURE:
            raise ValueError(f"'temperature' must be 0 (greedy) or at least {MIN_TEMPERATURE}")
        return temperature

    @model_validator(mode="after")
    def _consistent(self) -> "_Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' needs 'stream': true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """Body of POST /v1/completions."""

    prompt: str | list[int]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            return prompt[0]
        if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 2**31 for token in prompt):
            return prompt
        raise ValueError("'prompt' must be one string or one list of token ids: send more prompts as separate requests")

    @property
    def characters(self) -> int:
        """Length of the prompt; 0 if it is given as tokens."""
        return len(self.prompt) if isinstance(self.prompt, str) else 0

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def tops(self) -> int | None:
        """Number of alternatives to return per token; None returns no log-probabilities."""
        return self.logprobs


_Empty = Annotated[list[Any], Field(max_length=0)]


class TextPart(Object):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None


class ChatMessage(Object):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=1024)]
    name: str | None = None
    # fields of answers that clients send back
    refusal: Literal[""] | None = None
    annotations: _Empty | None = None
    audio: None = None
    parsed: None = None  # not in the API: the openai client's streaming helper adds it
    function_call: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _of_the_role(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the assistant has tool calls: leave out 'tool_calls'")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("'tool_call_id' belongs to a message of the role 'tool', which needs one")
        return self

    @model_validator(mode="before")
    @classmethod
    def _answer_without_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("role") == "assistant" and values.get("content") is None:
            return values | {"content": ""}
        return values

    def plain(self) -> dict[str, Any]:
        """The message for chat templates: `developer` is OpenAI's newer name for `system`, and arguments of calls are objects."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        more: dict[str, Any] = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        more |= {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **more}


class _ResponseFormat(Object):
    type: Literal["text"]


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    tools: Annotated[list[Tool], Field(max_length=TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: _Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    moderation: None = None

    @model_validator(mode="after")
    def _chat_consistent(self) -> "ChatRequest":
        if self.messages[-1].role == "assistant":
            raise ValueError("this server does not continue an assistant's message: end 'messages' with another role")
        if self.parallel_tool_calls is False and self.schemas:
            raise ValueError("this server does not limit the number of tool calls: leave out 'parallel_tool_calls'")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("'max_tokens' and 'max_completion_tokens' disagree: give one of them")
        return self

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; None if there are none, or if none may be called."""
        return [tool.plain() for tool in self.tools] if self.tools and self.tool_choice != "none" else None

    @property
    def characters(self) -> int:
        """Total length of all messages, tool calls and tools."""
        calls = sum(len(call.function.arguments) for message in self.messages for call in message.tool_calls or [])
        tools = len(json.dumps(self.schemas, ensure_ascii=False)) if self.schemas else 0
        return sum(len(message.plain()["content"]) for message in self.messages) + calls + tools

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def tops(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


T = TypeVar("T", bound=BaseModel)


def read(kind: type[T], payload: object) -> T:
    """Validate a parsed body as a request.

    Raises:
        Refused: 400, with a sentence about the first error.
    """
    if not isinstance(payload, dict):
        raise Refused(400, f"the body must be a JSON object, but it is {_name(payload)}", code="invalid_type")
    try:
        return kind.model_validate(payload)
    except ValidationError as bad:
        # a union reports all of its branches: the deepest is the intended one
        first = max(bad.errors(include_url=False), key=lambda e: len(e["loc"]))
        raise _sentence(first) from None


_OLD_TOOLS = "this server does not support '{}': use 'tools' and 'tool_calls'"
_NO_CONTROL = "this server does not control reasoning or verbosity: leave out '{}'"
_TEXT_ONLY = "this server answers only in plain text: leave out '{}'"
UNSUPPORTED = {
    "n": "this server gives one answer per request: leave out 'n' or give 1",
    "best_of": "this server gives one answer per request: leave out 'best_of' or give 1",
    "presence_penalty": "this server does not support 'presence_penalty': leave it out; 'repetition_penalty' is supported",
    "frequency_penalty": "this server does not support 'frequency_penalty': leave it out; 'repetition_penalty' is supported",
    "logit_bias": "this server does not support 'logit_bias': leave it out",
    "echo": "this server does not repeat the prompt: leave out 'echo'",
    "suffix": "this server does not fill in the middle: leave out 'suffix'",
    "include_obfuscation": "this server does not pad its streams: leave out 'include_obfuscation'",
    "moderation": "this server does not support moderation: leave out 'moderation'",
    "web_search_options": "this server does not support web search: leave out 'web_search_options'",
    "refusal": "this server does not support 'refusal': put its text into 'content'",
    "annotations": "this server does not support 'annotations': leave them out",
    "strict": "this server does not constrain answers to a schema: leave out 'strict'",
    "tool_choice": "this server does not force tool calls: give 'tool_choice' as auto or none, or leave it out",
    **dict.fromkeys(("functions", "function_call"), _OLD_TOOLS),
    **dict.fromkeys(("reasoning_effort", "verbosity"), _NO_CONTROL),
    **dict.fromkeys(("response_format", "modalities", "audio"), _TEXT_ONLY),
}


def _sentence(error: Any) -> Refused:
    # locations also contain the names of a union's branches, such as list[constrained-str]
    where = [part for part in error["loc"] if isinstance(part, int) or (part.isidentifier() and part not in ("str", "list"))]
    param = _short("".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")) or None
    known = next((part for part in where if part in UNSUPPORTED), None)
    if known is not None:
        return Refused(400, UNSUPPORTED[known].format(known), code="unsupported_parameter", param=param)
    if error["type"] == "extra_forbidden":
        name = _short(str(error["loc"][-1]))
        return Refused(400, f"this server has no field '{name}': leave it out", code="unknown_parameter", param=name)
    if error["type"] == "missing":
        return Refused(400, f"the field '{param}' is missing", code="missing_required_parameter", param=param)
    if error["type"] == "value_error":
        return Refused(400, str(error["ctx"]["error"]), code="invalid_value", param=param)
    message = error["msg"][:1].lower() + error["msg"][1:].replace(" after validation", "")
    return Refused(400, f"the field '{param}' is invalid: {message}", code="invalid_value", param=param)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"


def _name(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(type(value), "a number")

"""Requests and responses of OpenAI's `/v1/completions` and `/v1/chat/completions`.

An unsupported field that would change the answer is refused with an error, never ignored.
Values without effect are accepted, and so are bookkeeping fields (`user`, `metadata`, `store` …).
Every optional field may be null, and every answer can be sent back as a message.

Source: OpenAI API reference, "Completions" and "Chat".
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedtune.inference.serve.logprobs import TokenLogprob

INT64 = 2**63 - 1
STOPS = 16
MIN_TEMPERATURE = 1e-3  # logits divided by much less overflow


class Refused(Exception):
    """A refused request; `body()` is the error in OpenAI's format.

    Args:
        status: HTTP status.
        message: One sentence: the error and what to do.
        code: Error code for programs.
        param: The faulty field.
        retry_after: Seconds to wait before a retry.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class _Object(BaseModel):
    """A JSON object of a request: no unknown fields, no conversions; null in an optional field means that it is absent."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, info in cls.model_fields.items() if not info.is_required()}
        return {name: value for name, value in values.items() if value is not None or name not in optional}


class StreamOptions(_Object):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Request(_Object):
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
    def _warm(cls, temperature: float | None) -> float | None:
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


class TextPart(_Object):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None


class ChatMessage(_Object):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=1024)]
    name: str | None = None
    # fields of answers that clients send back
    refusal: Literal[""] | None = None
    annotations: _Empty | None = None
    audio: None = None
    parsed: None = None  # not in the API: the openai client's streaming helper adds it
    function_call: None = None
    tool_calls: _Empty | None = None

    @model_validator(mode="before")
    @classmethod
    def _answer_without_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("role") == "assistant" and values.get("content") is None:
            return values | {"content": ""}
        return values

    def plain(self) -> dict[str, str]:
        """The message for chat templates: `developer` is OpenAI's newer name for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _ResponseFormat(_Object):
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
    tools: _Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None  # without tools it has no effect
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
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("'max_tokens' and 'max_completion_tokens' disagree: give one of them")
        return self

    @property
    def characters(self) -> int:
        """Total length of all messages."""
        return sum(len(message.plain()["content"]) for message in self.messages)

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


_NO_TOOLS = "this server does not support tools: leave out '{}'"
_NO_ADVICE = "this server does not control reasoning or verbosity: leave out '{}'"
_TEXT_ALONE = "this server answers only in plain text: leave out '{}'"
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
    **dict.fromkeys(("tools", "tool_choice", "tool_calls", "parallel_tool_calls", "functions", "function_call"), _NO_TOOLS),
    **dict.fromkeys(("reasoning_effort", "verbosity"), _NO_ADVICE),
    **dict.fromkeys(("response_format", "modalities", "audio"), _TEXT_ALONE),
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
    return {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")


@dataclass(kw_only=True)
class ResponseFormatter:
    """Formats the pieces of one answer for its route.

    Other arguments:
        created: Unix time of the request.
    """

    chat: bool
    id: str
    model: str
    usage_in_stream: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _offset: int = 0  # characters sent so far, for `text_offset`

    def opening(self) -> list[bytes]:
        """The first events of a stream."""
        return [self._chunk({"role": "assistant", "content": ""}, None, None)] if self.chat else []

    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        return self._chunk({"content": text} if self.chat else text, logprobs, None)

    def closing(self, finish: str, usage: dict[str, Any]) -> list[bytes]:
        """The last events of a stream."""
        out = [self._chunk({} if self.chat else "", None, finish)]
        if self.usage_in_stream:
            out.append(event(self._envelope(streaming=True) | {"choices": [], "usage": usage}))
        return [*out, b"data: [DONE]\n\n"]

    def whole(self, text: str, logprobs: Sequence[TokenLogprob] | None, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The response to a request without streaming."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": self._logprobs(logprobs)}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return self._envelope(streaming=False) | {"choices": [choice], "usage": usage}

    def _chunk(self, what: Any, logprobs: Sequence[TokenLogprob] | None, finish: str | None) -> bytes:
        choice = {"index": 0, "delta" if self.chat else "text": what, "logprobs": self._logprobs(logprobs), "finish_reason": finish}
        return event(self._envelope(streaming=True) | {"choices": [choice]} | ({"usage": None} if self.usage_in_stream else {}))

    def _envelope(self, *, streaming: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if streaming else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        if self.chat:
            return {"content": [_describe(t) | {"top_logprobs": [_describe(rival) for rival in t.top]} for t in tokens]}
        offsets = []
        for t in tokens:
            offsets.append(self._offset)
            self._offset += len(t.token)
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{rival.token: rival.logprob for rival in t.top} for t in tokens],
            "text_offset": offsets,
        }


def _describe(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": None if token.raw is None else list(token.raw)}


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n\n"


def usage(prompt: int, answer: int, *, cached: int = 0) -> dict[str, Any]:
    """OpenAI's `usage`, in tokens; `cached`: prompt tokens found in the cache."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }

"""Responses of OpenAI's `/v1/completions` and `/v1/chat/completions`, whole or as a stream of events.

Source: OpenAI API reference, "Completions" and "Chat".
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtune.inference.serve.logprobs import TokenLogprob
from fedtune.inference.serve.tools import CallReader


@dataclass(kw_only=True)
class ResponseFormatter:
    """Formats the pieces of one answer for its route.

    Args:
        chat: Whether the route is `/v1/chat/completions`.
        id: The answer's id.
        model: The model's name in the request.
        usage_in_stream: Whether the last event of a stream is the usage.
        calls: Reads tool calls from the answer; None leaves them in the text.

    Other arguments:
        created: Unix time of the request.
    """

    chat: bool
    id: str
    model: str
    usage_in_stream: bool = False
    calls: CallReader | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _offset: int = 0  # characters sent so far, for `text_offset`

    def opening(self) -> list[bytes]:
        """The first events of a stream."""
        return [self._chunk({"role": "assistant", "content": ""}, None, None)] if self.chat else []

    def piece(self, text: str, logprobs: Sequence[TokenLogprob] | None) -> bytes:
        """The event for a piece of the answer; b"" if it has neither text nor log-probabilities."""
        text = self.calls.push(text) if self.calls else text
        return self._chunk({"content": text} if self.chat else text, logprobs, None) if text or logprobs else b""

    def closing(self, finish: str, usage: dict[str, Any]) -> list[bytes]:
        """The last events of a stream."""
        out = []
        if self.calls is not None:
            text, calls = self.calls.finish()
            if text:
                out.append(self._chunk({"content": text}, None, None))
            if calls:
                finish = "tool_calls"
                out.append(self._chunk({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}, None, None))
        out.append(self._chunk({} if self.chat else "", None, finish))
        if self.usage_in_stream:
            out.append(event(self._envelope(streaming=True) | {"choices": [], "usage": usage}))
        return [*out, b"data: [DONE]\n\n"]

    def whole(self, text: str, logprobs: Sequence[TokenLogprob] | None, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The response to a request without streaming."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls is not None:
            shown, (rest, calls) = self.calls.push(text), self.calls.finish()
            if calls:
                finish = "tool_calls"
                message |= {"content": shown + rest or None, "tool_calls": calls}
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": self._logprobs(logprobs)}
        choice |= {"message": message} if self.chat else {"text": text}
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

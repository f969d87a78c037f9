"""The served model, and the conversion of HTTP requests to token ids and to requests for the scheduler."""

import contextlib
import logging
import secrets
from dataclasses import dataclass
from typing import Any

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.text import Text, wrap
from fedtune.inference.serve.limits import Limits
from fedtune.inference.serve.protocol import ChatRequest, CompletionRequest
from fedtune.inference.serve.refusal import Refused
from fedtune.inference.serve.tools import MARK

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
TOO_LONG = "context_length_exceeded"
_log = logging.getLogger("fedtune.serve")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The served model.

    Args:
        name: The model's name.
        aliases: Further names of the model. Answers to them state `name`.
        chosen: The separate adapter that these names select; None is the model without one.
        text: Its tokenizer and chat template.
        adapters: Names of separate adapters; clients see each as a model.
        prompt: The run's prompt template, for single messages if there is no chat template.
        answer: Default length of a chat answer, in tokens; None means the maximum.
    """

    name: str
    text: Text
    aliases: tuple[str, ...] = ()
    chosen: str | None = None
    adapters: tuple[str, ...] = ()
    prompt: str | None = None
    answer: int | None = None

    @property
    def chats(self) -> bool:
        return self.text.template is not None or self.prompt is not None

    def adapter(self, model: str) -> str | None:
        """The adapter of a model name; None is the model without one. Raises Refused (404)."""
        if model == self.name or model in self.aliases:
            return self.chosen
        if model in self.adapters:
            return model
        raise Refused(404, f"there is no model of that name: use {', '.join(self.models)}", code="model_not_found", param="model")

    @property
    def writes_calls(self) -> bool:
        """Whether the model writes tool calls in the form that `CallReader` reads: its chat template does."""
        return MARK in (self.text.template or "")

    @property
    def models(self) -> tuple[str, ...]:
        return (*self.aliases, self.name, *self.adapters)

    def full_name(self, model: str) -> str:
        """The name that answers state: `name` for an alias."""
        return self.name if model in self.aliases else model

    def check_length(self, characters: int, context: int) -> None:
        """Raise Refused (400) if a prompt of `characters` cannot fit `context` tokens, even with the longest tokens."""
        if characters > context * self.text.longest:
            raise Refused(400, f"the prompt's {characters} characters are too many for {context} tokens: shorten it", code=TOO_LONG)

    def tokens(self, asked: CompletionRequest | ChatRequest, context: int) -> list[int]:
        """Encode the prompt. Raises Refused: 400 if it is invalid, 500 if the chat template or the tokenizer fails on a valid one."""
        param = "messages" if isinstance(asked, ChatRequest) else "prompt"
        try:
            if not isinstance(asked, ChatRequest):
                return asked.prompt if isinstance(asked.prompt, list) else self.text.encode(asked.prompt)
            prompt = self._chat([message.plain() for message in asked.messages], asked.schemas)
            self.check_length(len(prompt), context)  # a template may add text
            return self.text.encode(prompt, begin=self.text.template is None)
        except ConfigError as bad:
            raise Refused(400, str(bad), code="invalid_value", param=param) from None
        except ModelError as bad:
            _log.warning("%s", bad)
            raise Refused(500, str(bad), code="template_failed" if param == "messages" else "tokenizer_failed", param=param) from None

    def _chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        if self.text.template is not None:
            prompt = self.text.chat(messages, tools)
            if tools and prompt == self.text.chat(messages):
                raise ConfigError("the model's chat template ignores tools: leave out 'tools'")
            without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
            if without != messages:
                with contextlib.suppress(ConfigError, ModelError):  # a template may refuse an answer without text and call
                    if prompt != self.text.chat(without, tools):
                        return prompt
                    raise Refused(400, "the model's chat template ignores tool calls: leave out 'tool_calls'", param="messages")
            return prompt
        if tools:
            raise ConfigError("this model has no chat template, so it cannot use tools: leave out 'tools'")
        if self.prompt is None:
            raise ConfigError("this model has no chat template: use /v1/completions")
        if [message["role"] for message in messages] != ["user"]:
            raise ConfigError("this model was tuned on single requests: send one message of the role 'user'")
        return wrap(messages[0]["content"], self.prompt)


def make_generation_request(
    asked: CompletionRequest | ChatRequest,
    ids: list[int],
    adapter: str | None,
    served: ServedModel,
    limits: Limits,
    context: int,
    deadline: float,
) -> GenerationRequest:
    """The scheduler's request, whose answer fits the context and the server's limits.

    Args:
        context: Maximum number of tokens of a prompt with its answer.
        deadline: End of the answer, in seconds of the monotonic clock.

    Raises:
        Refused: 400 (prompt and requested answer do not fit).
    """
    space = context - len(ids)
    if space < 1:
        raise Refused(
            400,
            f"the prompt's {len(ids)} tokens fill the model's context of {context}: shorten it",
            code=TOO_LONG,
        )
    count = asked.limit
    if count is None:  # without a requested length, the limits may shorten the answer
        count = COMPLETION_TOKENS if isinstance(asked, CompletionRequest) else served.answer or limits.max_tokens
        count = min(count, limits.max_tokens, space)
    elif count > limits.max_tokens:
        more = f", or start it with --max-tokens {count}" if count <= space else ""
        raise Refused(400, f"{count} new tokens exceed this server's limit of {limits.max_tokens}: request fewer{more}", param="max_tokens")
    elif count > space:
        raise Refused(
            400,
            f"the prompt's {len(ids)} tokens and {count} new tokens exceed the model's context of {context}: shorten one",
            code=TOO_LONG,
        )
    sampling = Sampling(
        temperature=0.0 if asked.top_p == 0 else 1.0 if asked.temperature is None else float(asked.temperature),  # top_p 0 is greedy
        top_k=asked.top_k or 0,
        top_p=float(asked.top_p or 1.0),
        min_p=float(asked.min_p or 0.0),
        repetition_penalty=1.0 if asked.repetition_penalty is None else float(asked.repetition_penalty),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,  # without a seed, answers differ
        stop=asked.stops,
    )
    joins = isinstance(asked, CompletionRequest)
    return GenerationRequest(
        ids=ids,
        sampling=sampling,
        max_new_tokens=count,
        deliver=_nobody,
        joins=joins,
        adapter=adapter,
        rivals=asked.tops,
        deadline=deadline,
    )


def _nobody(out: Output) -> None:
    """A placeholder until the answer starts."""

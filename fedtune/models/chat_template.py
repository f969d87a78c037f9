"""The tokenizer's chat template in training: which part of a conversation the model answers, as token ids and labels.

A template's own `{% generation %}` marks determine the answers' text. Without marks, an answer is what the template adds to the prompt that
generation continues: the rendering of all messages up to the answer, minus the rendering before it with the generation prompt. Some
templates render earlier messages differently later (Qwen3 removes thoughts, Mistral moves the system message). An answer in such a place is
found by rendering the conversation with a marker in its place.

The answer's end token is a target too, because generation stops at it; white space after it is not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.contracts.task import IGNORED
from fedtune.errors import DataError, ModelError

_MARKER = "\u2042fedtune\u2042"
DEFAULT = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{%- else -%}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)

Message = Mapping[str, Any]


def ensure_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the default one: a line for each message, and the end token after an answer.

    Raises:
        ModelError: The tokenizer has no end token.
    """
    if tokenizer.chat_template is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a chat template nor an end token: set eos_token in its tokenizer_config.json")
    starts = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = ("{{- bos_token -}}" if starts else "") + DEFAULT


def render(tokenizer: Any, messages: Sequence[Message], *, generate: bool = False) -> str:
    """The conversation as text; with `generate` followed by the start of an answer.

    Raises:
        DataError: The template refuses the messages.
    """
    return _render(tokenizer, messages, generate)[0]


def encode_conversation(tokenizer: Any, messages: Sequence[Message]) -> "tuple[np.ndarray, np.ndarray, int]":
    """Token ids of a conversation that ends with an answer, with the answers' tokens as labels.

    Returns:
        input_ids (T,) int32, up to the last target; labels (T,) int32, -100 outside of answers; the first token of the last answer.

    Raises:
        DataError: The template refuses the messages, or does not show the last answer.
    """
    text, marked = _render(tokenizer, messages, generate=False)
    spans = marked or _spans(tokenizer, messages, text)
    if not spans:
        raise DataError(f"the model's chat template does not show the answer {str(messages[-1].get('content'))[:40]!r}: see its text")
    ids, offsets = _tokenize(tokenizer, text, [start for start, _ in spans])
    special, labels, begun = _special(tokenizer), np.full(len(ids) + 1, IGNORED, np.int32), 0
    out = np.append(ids, tokenizer.eos_token_id or 0).astype(np.int32)
    for start, end in spans:
        own = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0]))
        if not len(own):
            continue
        first, last = int(own[0]), int(own[-1])
        ends = [i for i in range(first, last + 1) if ids[i] in special and not text[offsets[i, 1] : end].strip()]
        if ends:
            last = ends[0]
        else:  # the answer's text has no end token: it may come after white space, or not at all
            after = next((i for i in range(last + 1, len(ids)) if text[offsets[i, 0] : offsets[i, 1]].strip()), None)
            if after is not None and ids[after] in special and not text[end : offsets[after, 0]].strip():
                last = after
            elif after is None and tokenizer.eos_token_id is not None:  # generation would not stop after the last answer
                out[last + 1] = tokenizer.eos_token_id
                last += 1
        labels[first : last + 1] = out[first : last + 1]
        begun = first
    count = int(np.flatnonzero(labels != IGNORED)[-1]) + 1
    return out[:count], labels[:count], begun


def answer_end(tokenizer: Any) -> int | None:
    """The token that ends an answer in the tokenizer's chat template; None if the template ends it with text."""
    ids, labels, _ = encode_conversation(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return int(ids[-1]) if labels[-1] != IGNORED and int(ids[-1]) in _special(tokenizer) else None


def _render(tokenizer: Any, messages: Sequence[Message], generate: bool) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the template's own marks of the answers, as character ranges."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    marks = "{% generation" in template or "{%- generation" in template
    chat = [dict(m) for m in messages]
    try:
        texts, found = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            add_generation_prompt=generate,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
        )
    except Exception as bad:  # a template can raise anything
        reason = (str(bad).splitlines() or [repr(bad)])[0][:120]
        raise DataError(f"the model's chat template refuses a conversation: {reason}") from None
    return texts[0], [(int(start), int(end)) for start, end in found[0]] if marks and found else []


def _spans(tokenizer: Any, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """The character ranges of the answers in the rendered conversation; an answer that the template does not show has none."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(tokenizer, messages[:i], generate=True) if i else "", render(tokenizer, messages[: i + 1])
        start = len(before) if text.startswith(before) else None
        end = len(after) if text.startswith(after) else None
        if start is None or end is None:
            other = render(tokenizer, [*messages[:i], {**message, "content": _MARKER}, *messages[i + 1 :]])
            head, found, tail = other.partition(_MARKER)
            if not found or message.get("tool_calls") or not text.endswith(tail):
                continue
            start, end = _common(text, head) if start is None else start, len(text) - len(tail) if end is None else end
        if start < end:
            spans.append((start, end))
    return spans


def _common(one: str, two: str) -> int:
    """Length of the common start."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _tokenize(tokenizer: Any, text: str, starts: Sequence[int]) -> "tuple[np.ndarray, np.ndarray]":
    """Token ids (T,) and character ranges (T, 2), split at the answers' starts where the tokenizer would join prompt and answer."""
    ids, offsets = _whole(tokenizer, text, 0)
    if all((offsets[:, 0] == start).any() or start >= len(text) for start in starts):
        return ids, offsets
    cuts = [0, *starts, len(text)]
    parts = [_whole(tokenizer, text[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([offsets for _, offsets in parts])


def _whole(tokenizer: Any, text: str, at: int) -> "tuple[np.ndarray, np.ndarray]":
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} gives no positions of its tokens, which task.kind=chat needs: take a fast tokenizer")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    return np.array(found.input_ids, np.int32), np.array(found.offset_mapping, np.int64).reshape(-1, 2) + at


def _special(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

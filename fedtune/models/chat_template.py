"""The tokenizer's chat template in training: which part of a conversation the model answers, as token ids and labels.

A template's own `{% generation %}` marks determine the answers' text. Without marks, an answer is what the template adds to the prompt that
generation continues: the rendering of all messages up to the answer, minus the rendering before it with the generation prompt. Some
templates render earlier messages differently later (Qwen3 removes thoughts, Mistral moves the system message). An answer in such a place,
or with no message before it, is found by rendering the conversation with a marker in its place.

The answer's end token is a target too, because generation stops at it; white space after it is not.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.contracts.task import IGNORED
from fedtune.errors import DataError, ModelError

_MARKER = "\u2042fedtune\u2042"
_MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
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
    from fedtune.data.examples import begin  # late: it loads datasets

    if tokenizer.chat_template is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a chat template nor an end token: set eos_token in its tokenizer_config.json")
    tokenizer.chat_template = ("{{- bos_token -}}" if begin(tokenizer) else "") + DEFAULT


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
    start_of_last = _begin(tokenizer, messages, text, spans)
    ids, offsets = _tokenize(tokenizer, text, sorted({start_of_last, *(start for start, _ in spans)}))
    special, labels = _special(tokenizer), np.full(len(ids) + 1, IGNORED, np.int32)
    out = np.append(ids, tokenizer.eos_token_id or 0).astype(np.int32)
    blank = [not text[a:b].strip() for a, b in offsets]
    for start, end in spans:
        first, last = (int((offsets[:, 0] < edge).sum()) for edge in (start, end))  # tokens [first, last) begin in the answer
        while last > first and offsets[last - 1, 1] > end and not text[offsets[last - 1, 0] : end].strip():
            last -= 1  # a word after the answer with the blank before it
        tail = next((i for i in reversed(range(first, last)) if not blank[i] and ids[i] not in special), first - 1) + 1
        ends = [i for i in range(tail, last) if ids[i] in special]
        after = next((i for i in range(last, len(ids)) if not blank[i]), None)
        if ends:
            last = ends[0] + 1
        elif after is not None and ids[after] in special:
            last = after + 1
        elif after is None and tokenizer.eos_token_id is not None:  # generation would not stop after the last answer
            out[last] = tokenizer.eos_token_id
            last += 1
        labels[first:last] = out[first:last]
    targets = np.flatnonzero(labels != IGNORED)
    answer = targets[targets >= (offsets[:, 0] < start_of_last).sum()]
    if not len(answer) or not answer[0]:  # not shown, or without a prompt before it
        answer = str(messages[-1].get("content"))[:40]
        raise DataError(f"the model's chat template does not show the answer {answer!r}: remove the row, or correct the template")
    return out[: targets[-1] + 1], labels[: targets[-1] + 1], int(answer[0])


def answer_end(tokenizer: Any) -> int | None:
    """The token that ends an answer in the tokenizer's chat template; None if the template ends it with text."""
    ids, labels, _ = encode_conversation(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return int(ids[-1]) if labels[-1] != IGNORED and int(ids[-1]) in _special(tokenizer) else None


def _render(tokenizer: Any, messages: Sequence[Message], generate: bool) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the template's own marks of the answers, as character ranges."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    marks = _MARKS.search(template) is not None
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


def _begin(tokenizer: Any, messages: Sequence[Message], text: str, spans: Sequence[tuple[int, int]]) -> int:
    """The character at which the last answer begins: after the prompt that generation continues, if the text begins with it."""
    prompt = render(tokenizer, messages[:-1], generate=True) if len(messages) > 1 else None
    if prompt is not None and text.startswith(prompt):
        return len(prompt)
    return spans[-1][0] if spans else len(text)


def _spans(tokenizer: Any, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """The character ranges of the answers in the rendered conversation; an answer that the template does not show has none."""
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(tokenizer, messages[:i], generate=True) if i else None, render(tokenizer, messages[: i + 1])
        start = len(before) if before is not None and text.startswith(before) else None
        end = len(after) if text.startswith(after) else None
        if start is None or end is None:
            found = _search(tokenizer, messages, i, (before, after), text, spans[-1][1] if spans else 0)
            start, end = (found[0] if start is None else start, found[1] if end is None else end) if found else (0, -1)
        if start < end or (start == end and not message.get("content")):
            spans.append((start, end))
        elif i == len(messages) - 1:
            return []
    return spans


def _search(
    tokenizer: Any, messages: Sequence[Message], i: int, alone: tuple[str | None, str], text: str, since: int
) -> tuple[int, int] | None:
    """The character range of answer `i` in a text that shows earlier messages differently.

    Args:
        alone: The prompt of the answer (None if it is the first message), and the rendering up to the answer.
        since: Where the answer before it ends in the text.
    """
    before, after = alone
    message = {key: value for key, value in messages[i].items() if key != "tool_calls"} | {"content": _MARKER}
    try:
        head, found, tail = render(tokenizer, [*messages[:i], message, *messages[i + 1 :]]).partition(_MARKER)
    except DataError:  # of a tool's answer without its call: the call is then as it was, in another place
        if before is None or not messages[i].get("tool_calls") or not after.startswith(before):
            raise
        at = text.find(after[len(before) :], since)
        return (at, at + len(after) - len(before)) if at >= 0 else None
    if not found or not text.endswith(tail):
        return None
    start, last = _common(text, head), render(tokenizer, [*messages[:i], message]).partition(_MARKER)[0]
    lead = last[len(before) :] if before is not None and last.startswith(before) else ""  # what the model writes before a content
    return start - len(lead) if start == len(head) and head.endswith(lead) else start, len(text) - len(tail)


def _common(one: str, two: str) -> int:
    """Length of the common start."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _tokenize(tokenizer: Any, text: str, starts: Sequence[int]) -> "tuple[np.ndarray, np.ndarray]":
    """Token ids (T,) and character ranges (T, 2), split at those starts of answers where the tokenizer would join prompt and answer."""
    ids, offsets = _whole(tokenizer, text, 0)
    joined = [start for start in starts if start < len(text) and not (offsets[:, 0] == start).any()]
    if not joined:
        return ids, offsets
    cuts = [0, *joined, len(text)]
    parts = [_whole(tokenizer, text[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([offsets for _, offsets in parts])


def _whole(tokenizer: Any, text: str, at: int) -> "tuple[np.ndarray, np.ndarray]":
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ModelError(f"{kind} gives no positions of its tokens, which a chat needs: add its tokenizer.json to the model")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    return np.array(found.input_ids, np.int32), np.array(found.offset_mapping, np.int64).reshape(-1, 2) + at


def _special(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

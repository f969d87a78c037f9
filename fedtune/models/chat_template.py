"""The tokenizer's chat template in training: which part of a conversation the model answers, as token ids and labels.

A template's own `{% generation %}` marks determine the answers' text. Without marks, an answer is what the template adds to the prompt that
generation continues: the rendering of all messages up to the answer, minus the rendering before it with the generation prompt. Some
templates render earlier messages differently later (Qwen3 removes thoughts, Mistral moves the system message). An answer in such a place,
or with no message before it, is found by rendering the conversation with a marker in its place.

The answer's end token is a target too, because generation stops at it; white space after it is not.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.config import TaskConfig
from fedtune.contracts.task import IGNORED
from fedtune.errors import DataError, ModelError
from fedtune.templates.render import Chat, Rendered, render

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
    from fedtune.data.examples import begin  # late: it loads torch

    if tokenizer.chat_template is not None:
        return
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has neither a chat template nor an end token: set eos_token in its tokenizer_config.json")
    tokenizer.chat_template = ("{{- bos_token -}}" if begin(tokenizer) else "") + DEFAULT


class Conversation:
    """A conversation in a tokenizer's chat template. It keeps its renderings, because several questions need the same ones.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: The messages.
        tools: JSON schemas of functions that the assistant may call; None if there are none.
        date: Date that a template prints (`strftime_now`), in ISO 8601.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        date: str = TaskConfig().date,
    ) -> None:
        self.tokenizer, self.messages = tokenizer, messages
        self._tools, self._date = tools or None, date
        self._template = tokenizer.get_chat_template(tools=self._tools)
        self._names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self._kept: dict[tuple[int, bool], Rendered] = {}
        self._tokens: tuple[str, tuple[np.ndarray, np.ndarray]] | None = None

    def load(self, *parts: tuple[int, bool]) -> None:
        """Render parts (number of messages, whether the start of an answer follows), all at once."""
        missing = [part for part in dict.fromkeys(parts) if part not in self._kept]
        chats = [Chat(messages=self.messages[:count], tools=self._tools, generate=generate) for count, generate in missing]
        if missing:
            self._kept |= zip(missing, render(self._template, chats, self._names, now=self._date), strict=True)

    def text(self, count: int | None = None, *, generate: bool = False) -> str:
        """The first `count` messages as text, with `generate` followed by the start of an answer.

        Raises:
            DataError: The template refuses the messages.
        """
        return self._part(count, generate).text

    def marks(self, count: int) -> list[tuple[int, int]]:
        """The template's own marks of the answers in the first `count` messages, as character ranges; [] without marks."""
        return [(start, end) for start, end in self._part(count, False).marks]

    def changed(self, *messages: Message) -> str:
        """The text of other messages. Raises DataError as `text` does."""
        chat = Chat(messages=messages, tools=self._tools, generate=False)
        return _checked(render(self._template, [chat], self._names, now=self._date)[0])

    def tokens(self, count: int) -> "tuple[np.ndarray, np.ndarray]":
        """Token ids (T,) and character ranges (T, 2) of the first `count` messages."""
        text = self.text(count)
        if self._tokens is None or self._tokens[0] != text:
            self._tokens = text, _whole(self.tokenizer, text, 0)
        return self._tokens[1]

    def hides_a_call(self) -> bool:
        """Whether the template does not show a tool call: it renders the message as if it had none."""
        for i, message in enumerate(self.messages):
            if message.get("tool_calls"):
                without = {key: value for key, value in message.items() if key != "tool_calls"}
                shown = self.text(i + 1)
                with contextlib.suppress(DataError):  # a template may refuse a message without text and call
                    if self.changed(*self.messages[:i], without) == shown:
                        return True
        return False

    def _part(self, count: int | None, generate: bool) -> Rendered:
        part = len(self.messages) if count is None else count, generate
        self.load(part)
        _checked(self._kept[part])
        return self._kept[part]


def _checked(found: Rendered) -> str:
    if found.refused:
        raise DataError(f"the model's chat template refuses a conversation ({found.refused}): correct or remove it")
    if found.fault:
        raise DataError(f"the model's chat template fails on a conversation ({found.fault}): correct or remove it")
    return found.text


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
) -> "tuple[np.ndarray, np.ndarray, int]":
    """`encode_start` of a whole conversation."""
    return encode_start(Conversation(tokenizer, messages, tools=tools), len(messages))


def encode_start(conversation: Conversation, count: int) -> "tuple[np.ndarray, np.ndarray, int]":
    """Token ids of the first `count` messages, which end with an answer, with the answers' tokens as labels.

    Returns:
        input_ids (T,) int32, up to the last target; labels (T,) int32, -100 outside of answers; the first token of the last answer.

    Raises:
        DataError: The template refuses the messages, or does not show the last answer.
    """
    tokenizer, messages = conversation.tokenizer, conversation.messages[:count]
    text, marked = conversation.text(count), conversation.marks(count)
    answers = () if marked else [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    conversation.load(*[(count - 1, True)] * (count > 1), *((i, True) for i in answers if i), *((i + 1, False) for i in answers))
    spans = marked or _spans(conversation, count, text)
    start_of_last = _begin(conversation, count, text, spans)
    ids, offsets = _tokenize(conversation, count, sorted({start_of_last, *(start for start, _ in spans)}))
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


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Begin the sentence of an error with the row's name."""
    try:
        yield
    except (DataError, ModelError) as bad:
        raise type(bad)(f"{where}: {bad}") from None


def answer_end(tokenizer: Any) -> int | None:
    """The token that ends an answer in the tokenizer's chat template; None if the template ends it with text."""
    ids, labels, _ = encode_conversation(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    return int(ids[-1]) if labels[-1] != IGNORED and int(ids[-1]) in _special(tokenizer) else None


def _begin(conversation: Conversation, count: int, text: str, spans: Sequence[tuple[int, int]]) -> int:
    """The character at which the last answer begins: after the prompt that generation continues, if the text begins with it."""
    prompt = conversation.text(count - 1, generate=True) if count > 1 else None
    if prompt is not None and text.startswith(prompt):
        return len(prompt)
    return spans[-1][0] if spans else len(text)


def _spans(conversation: Conversation, count: int, text: str) -> list[tuple[int, int]]:
    """The character ranges of the answers in the rendered messages; an answer that the template does not show has none."""
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(conversation.messages[:count]):
        if message["role"] != "assistant":
            continue
        before, after = conversation.text(i, generate=True) if i else None, conversation.text(i + 1)
        start = len(before) if before is not None and text.startswith(before) else None
        end = len(after) if text.startswith(after) else None
        if start is None or end is None:
            found = _search(conversation, count, i, (before, after), text, spans[-1][1] if spans else 0)
            start, end = (found[0] if start is None else start, found[1] if end is None else end) if found else (0, -1)
        if start < end or (start == end and not message.get("content")):
            spans.append((start, end))
        elif i == count - 1:
            return []
    return spans


def _search(conversation: Conversation, count: int, i: int, alone: tuple[str | None, str], text: str, since: int) -> tuple[int, int] | None:
    """The character range of answer `i` in a text that shows earlier messages differently.

    Args:
        alone: The prompt of the answer (None if it is the first message), and the rendering up to the answer.
        since: Where the answer before it ends in the text.
    """
    before, after = alone
    messages = conversation.messages
    message = {key: value for key, value in messages[i].items() if key != "tool_calls"} | {"content": _MARKER}
    try:
        head, found, tail = conversation.changed(*messages[:i], message, *messages[i + 1 : count]).partition(_MARKER)
    except DataError:  # of a tool's answer without its call: the call is then as it was, in another place
        if before is None or not messages[i].get("tool_calls") or not after.startswith(before):
            raise
        at = text.find(after[len(before) :], since)
        return (at, at + len(after) - len(before)) if at >= 0 else None
    if not found or not text.endswith(tail):
        return None
    start, last = _common(text, head), conversation.changed(*messages[:i], message).partition(_MARKER)[0]
    lead = last[len(before) :] if before is not None and last.startswith(before) else ""  # what the model writes before a content
    return start - len(lead) if start == len(head) and head.endswith(lead) else start, len(text) - len(tail)


def _common(one: str, two: str) -> int:
    """Length of the common start."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _tokenize(conversation: Conversation, count: int, starts: Sequence[int]) -> "tuple[np.ndarray, np.ndarray]":
    """Token ids (T,) and character ranges (T, 2), split at those starts of answers where the tokenizer would join prompt and answer."""
    text, (ids, offsets) = conversation.text(count), conversation.tokens(count)
    joined = [start for start in starts if start < len(text) and not (offsets[:, 0] == start).any()]
    if not joined:
        return ids, offsets
    cuts = [0, *joined, len(text)]
    parts = [_whole(conversation.tokenizer, text[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([offsets for _, offsets in parts])


def _whole(tokenizer: Any, text: str, at: int) -> "tuple[np.ndarray, np.ndarray]":
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ModelError(f"{kind} gives no positions of its tokens, which a chat needs: add its tokenizer.json to the model")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    return np.array(found.input_ids, np.int32), np.array(found.offset_mapping, np.int64).reshape(-1, 2) + at


def _special(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

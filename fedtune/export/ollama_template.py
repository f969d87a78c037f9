"""Rewrites a tokenizer's chat template, which is Jinja, as one of Ollama's, which is Go's text/template.

The texts between the contents of a conversation are taken from renderings of conversations with marked contents:

    first system between question answer again prompt
      [first | system + between] question (answer content again question)* prompt

The system message stands before the first question (Llama 2, 3, Qwen, Gemma 3), within the last question (Mistral), or nowhere.
A template that such texts do not describe is refused: conversations of several lengths must come out equal, character by character.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.errors import DataError, ModelError
from fedtune.export.go_template import evaluate, fixed_text
from fedtune.models.chat_template import Conversation

__all__ = ["go_template"]

_MARKS = {"system": "\u2042sys%d\u2042", "user": "\u2042ask%d\u2042", "assistant": "\u2042say%d\u2042"}
_TEXTS = ('Say "hi" to {{ .System }} & {% x %}.', "Où?\n\nÀ Zürich, 東京 🙂", "a", "<b>'\\n'</b>", '"""', "1. one\n2. two")
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The fixed texts of a template.

    Args:
        first: Before the first question, without a system message.
        answer, again: Between a question and its answer, and between that and the next question.
        prompt: After the last question.
        system: Texts before and after a system message; None if the template shows none.
        last: The same for a later question, if the system message stands in the last question; None if it stands in front.
    """

    first: str
    answer: str
    again: str
    prompt: str
    system: tuple[str, str] | None = None
    last: tuple[str, str] | None = None


def go_template(tokenizer: Any) -> tuple[str, str]:
    """Return Ollama's template, and its differences from the tokenizer's in sentences; "" if there are none.

    Raises:
        ModelError: Ollama's language cannot express the chat template.
        DataError: The chat template refuses a conversation of one question.
    """
    texts, system = _read(tokenizer)
    template = _write(texts)
    for turns in range(1, 6):
        for first in (False, True) if system else (False,):
            chat = _chat(turns, first, lambda role, i: _TEXTS[(i + len(role)) % len(_TEXTS)])
            if _go(template, chat) != Conversation(tokenizer, chat).text(generate=True):
                raise _inexpressible(f"a conversation with {turns} questions differs")
    return template, "; ".join(_notes(tokenizer, template, system))


def _inexpressible(why: str) -> ModelError:
    return ModelError(
        f"the model's chat template cannot be rewritten for Ollama ({why}): use --to gguf and llama.cpp, which runs it as it is"
    )


def _chat(turns: int, system: bool, text: Any) -> list[Message]:
    """A conversation that ends with a question."""
    chat = [{"role": "system", "content": text("system", 0)}] if system else []
    for i in range(turns):
        chat += [{"role": "user", "content": text("user", i)}, {"role": "assistant", "content": text("assistant", i)}]
    return chat[:-1]


def _go(template: str, chat: Sequence[Message]) -> str:
    """The conversation as Ollama renders it, which joins all system messages in `System`."""
    system = "\n\n".join(m["content"] for m in chat if m["role"] == "system")
    return evaluate(template, System=system, Messages=[{"Role": m["role"], "Content": m["content"]} for m in chat])


def _gaps(tokenizer: Any, turns: int, system: bool) -> dict[tuple[str, str], list[str]]:
    """The texts between contents, by the roles of the content before and after; "" is the start or end of the conversation."""
    chat = _chat(turns, system, lambda role, i: _MARKS[role] % i)
    text, at, role = Conversation(tokenizer, chat).text(generate=True), 0, ""
    found: dict[tuple[str, str], list[str]] = {}
    places = []
    for message in chat:
        if text.count(message["content"]) != 1:
            raise _inexpressible(f"it shows a {message['role']}'s message {text.count(message['content'])} times")
        places.append((text.index(message["content"]), message))
    for place, message in sorted(places, key=lambda item: item[0]):
        found.setdefault((role, message["role"]), []).append(text[at:place])
        at, role = place + len(message["content"]), message["role"]
    found[role, ""] = [text[at:]]
    return found


def _read(tokenizer: Any) -> tuple[_Texts, bool]:
    """The template's texts, and whether it takes a system message."""
    plain, one = _gaps(tokenizer, 3, False), _gaps(tokenizer, 1, False)
    texts = _Texts(
        first=plain["", "user"][0], answer=plain["user", "assistant"][0], again=plain["assistant", "user"][0], prompt=one["user", ""][0]
    )
    try:
        Conversation(tokenizer, _chat(1, True, lambda role, i: _MARKS[role] % i)).text(generate=True)
    except DataError:
        return texts, False
    try:
        several, single = _gaps(tokenizer, 3, True), _gaps(tokenizer, 1, True)
    except ModelError:
        if _MARKS["system"] % 0 not in Conversation(tokenizer, _chat(3, True, lambda role, i: _MARKS[role] % i)).text(generate=True):
            return texts, True
        raise
    around = single["", "system"][0], single["system", "user"][0]
    if ("", "system") in several:
        return _Texts(**{**vars(texts), "system": around}), True
    if ("assistant", "system") not in several:
        raise _inexpressible("it shows the system message elsewhere than before the first or in the last question")
    return _Texts(**{**vars(texts), "system": around, "last": (several["assistant", "system"][0], several["system", "user"][0])}), True


def _write(texts: _Texts) -> str:
    first, answer, again, prompt = (fixed_text(text) for text in (texts.first, texts.answer, texts.again, texts.prompt))
    on_system, first_question, later = "", first, again
    if texts.system:
        before, after = (fixed_text(text) for text in texts.system)
        if texts.last is None:
            on_system = '{{ if eq $m.Role "system" }}{{ if $first }}{{ $system = true }}' + before + "{{ $m.Content }}{{ end }}{{ end }}"
            first_question = "{{ if $system }}" + after + "{{ else }}" + first + "{{ end }}"
        else:
            inside = "{{ if and $last $.System }}%s{{ $.System }}%s{{ else }}%s{{ end }}"
            first_question = inside % (before, after, first)
            later = inside % (*(fixed_text(text) for text in texts.last), again)
    return (
        "{{ $first := true }}{{ $system := false }}{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + on_system
        + '{{ if eq $m.Role "user" }}{{ if $first }}{{ $first = false }}'
        + first_question
        + "{{ else }}"
        + later
        + "{{ end }}{{ $m.Content }}{{ if $last }}"
        + prompt
        + '{{ end }}{{ else if eq $m.Role "assistant" }}'
        + answer
        + "{{ $m.Content }}{{ end }}{{ end }}"
    )


def _notes(tokenizer: Any, template: str, system: bool) -> list[str]:
    """What differs in conversations that `go_template` does not compare."""
    notes = []
    if not system:
        notes.append("the chat template refuses system messages, and Ollama leaves them out")
    blanks = _chat(2, system, lambda role, i: f" {role}\n")
    if Conversation(tokenizer, blanks).text(generate=True) != _go(template, blanks):
        notes.append("the chat template removes white space around a message, and Ollama keeps it")
    thoughts = _chat(2, False, lambda role, i: "<think>\nHm.\n</think>\n\nYes." if role == "assistant" else "Why?")
    if Conversation(tokenizer, thoughts).text(generate=True) != _go(template, thoughts):
        notes.append("the chat template removes thoughts from earlier answers, and Ollama keeps them")
    if "strftime_now" in tokenizer.get_chat_template():
        notes.append("the chat template writes the date, and Ollama's keeps that of the export")
    return notes

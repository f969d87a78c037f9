"""Conversations in the forms in which data sets store them, as messages: JSON text of a list of {"role", "content", …}.

Forms: `messages` with roles and contents; ShareGPT's `conversations` with `from` and `value`; a prompt with an answer; Alpaca's
`instruction`, `input` and `output`. A content may be a text or a list of text parts.
"""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedtune.errors import DataError
from fedtune.storage.parsing import parse_json

COLUMNS = ("messages", "conversations")  # of a source, in this order
TOOLS = "tools"  # of a source: the JSON schemas of the functions that the assistant may call
PAIR = ("prompt", "answer")
ALPACA = ("instruction", "output")
ALPACA_OPTIONAL = ("input", "system")
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "developer": "system",
}  # fmt: skip
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # further keys of a message, which templates use


def form(present: Collection[str], maps: Mapping[str, str], templates: Collection[str]) -> str:
    """The form of a source's conversations: a column's name, "pair", "alpaca", or "" if the source has none.

    Args:
        present: The source's columns.
        maps: fedtune's column → the source's.
        templates: fedtune's columns that a template fills.
    """
    if "messages" in maps:
        return maps["messages"] if maps["messages"] in present else ""
    if all(name in templates or name in maps for name in PAIR):
        return "pair"
    if found := [name for name in COLUMNS if name in present]:
        return found[0]
    if all(name in present for name in PAIR):
        return "pair"
    return "alpaca" if all(name in present for name in ALPACA) else ""


def read_row(row: Mapping[str, Any], what: str, number: int) -> tuple[str, str] | None:
    """A row's conversation and its tools, as `read_messages` and `read_tools` give them; None if it has no column of messages.

    Raises:
        DataError: As `read_messages` and `read_tools`.
    """
    for column in COLUMNS:
        value = row.get(column)
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[")):
            return read_messages([row[column]], what, number)[0], read_tools([row.get(TOOLS)], what, number)[0]
    return None


def read_messages(values: Sequence[Any], what: str, first: int = 1) -> list[str]:
    """Conversations of a column as JSON text.

    Args:
        values: Lists of messages, or their JSON text.
        what: "training" or "test", or a file, for errors.
        first: Number of the first row.

    Raises:
        DataError: A row is not a conversation with an answer; names the row.
    """
    out = []
    for number, value in enumerate(values, first):
        try:
            out.append(_text(_messages(value)))
        except UnicodeEncodeError as bad:  # JSON can contain half a surrogate pair, which is not text
            raise DataError(f"{what} row {number} has {bad.object[bad.start]!r}, which is not a character: clean the file") from None
        except ValueError as bad:
            raise DataError(f"{what} row {number} is not a conversation: {bad}") from None
    return out


def read_pairs(prompts: Sequence[Any] | None, better: Sequence[Any], worse: Sequence[Any], what: str) -> tuple[list[str], list[str]]:
    """Pairs of conversations that differ in their last message, an answer, as JSON text: the chosen ones and the rejected ones.

    Args:
        prompts: What comes before the answers: a request as text, messages, or their JSON text. None, or None for a row, if both
            conversations of the row are whole.
        better, worse: Answers as text, or messages that end with the answer. Unless they begin with an answer, they are whole.
        what: "training" or "test", for errors.

    Raises:
        DataError: A row is not such a pair; names the row.
    """
    out: tuple[list[str], list[str]] = [], []
    for number, (prompt, *pair) in enumerate(zip(prompts or [None] * len(better), better, worse, strict=True), 1):
        try:
            before = [] if prompt is None else _turns(prompt, "user")
            found = [_whole(before, _turns(value, "assistant")) for value in pair]
            if found[0][:-1] != found[1][:-1]:
                raise ValueError("the conversations differ before their last message; give both the same prompt")
            if found[0] == found[1]:
                raise ValueError("chosen and rejected are the same; remove the row")
            for texts, messages in zip(out, found, strict=True):
                texts.append(_text(messages))
        except UnicodeEncodeError as bad:
            raise DataError(f"{what} row {number} has {bad.object[bad.start]!r}, which is not a character: clean the file") from None
        except ValueError as bad:
            raise DataError(f"{what} row {number} is not a pair of answers: {bad}") from None
    return out


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    """Messages, their JSON text, or another text as one message of this role."""
    if isinstance(value, str):
        found = None
        if value.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                found = parse_json(value)

        def is_message(each: Any) -> bool:  # an answer may itself be a JSON list
            return isinstance(each, Mapping) and bool({"role", "from"} & each.keys())

        if not isinstance(found, list) or not found or not all(map(is_message, found)):
            return [{"role": role, "content": value}]
        value = found
    if not isinstance(value, list) or not value:
        raise ValueError(f"{str(value)[:40]!r} is neither text nor a list of messages; correct it or remove the row")
    return [_message(each, number) for number, each in enumerate(value, 1)]


def _whole(before: list[dict[str, Any]], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation that ends with `turns`."""
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"its last message has the role '{turns[-1]['role']}', but an answer has the role 'assistant'; correct it")
    if turns[0]["role"] != "assistant":
        return turns
    if not before:
        raise ValueError("it has no prompt; set data.columns.prompt, or give whole conversations")
    return [*before, *turns]


def read_tools(values: Sequence[Any], what: str, first: int = 1) -> list[str]:
    """The tools of conversations as JSON text of a list of schemas; "" for a row without tools.

    Args:
        values: Lists of schemas, their JSON text, or None.
        what, first: As in `read_messages`.

    Raises:
        DataError: A row has other values; names the row.
    """
    out = []
    for number, value in enumerate(values, first):
        try:
            found = _without_nulls(parse_json(value) if isinstance(value, str) and value.strip() else value) or []
        except ValueError:
            found = value
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise DataError(
                f"{what} row {number} has tools that are no list of JSON schemas ({str(value)[:40]!r}): correct them, or rename the column"
            )
        out.append(json.dumps(found, ensure_ascii=False) if found else "")
    return out


def _without_nulls(value: Any) -> Any:
    """The value without the keys that Parquet and the hub add to make all rows alike."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def paired(requests: Sequence[str], answers: Sequence[str], systems: Sequence[str | None] | None = None) -> list[str]:
    """Conversations of one request and its answer, as JSON text; a system message comes first if it is not blank."""
    out = []
    for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        system = systems[i] if systems else None
        first = [{"role": "system", "content": system}] if system and system.strip() else []
        out.append(_text([*first, {"role": "user", "content": request}, {"role": "assistant", "content": answer}]))
    return out


def with_input(instruction: str, extra: str | None) -> str:
    """Alpaca's request: the instruction, and after a blank line its input if there is one."""
    return f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction


def _text(messages: list[dict[str, Any]]) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    text.encode()  # raises UnicodeEncodeError
    return text


def _messages(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise ValueError(f"{value[:40]!r} is not JSON; write a list of messages") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"it is {'empty' if not value else type(value).__name__}; write a list of messages")
    messages = [_message(each, number) for number, each in enumerate(value, 1)]
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no message has the role 'assistant', so there is nothing to learn; remove the row")
    return messages


def _message(value: Any, number: int) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"message {number} is {type(value).__name__}; write an object with role and content")
    role, content = (value.get("role"), value.get("content")) if value.get("role") is not None else (value.get("from"), value.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {number} has the role {role!r}; choose system, user, assistant or tool")
    more = {key: value[key] for key in _KEPT if value.get(key) not in (None, [])}
    if content is None and "tool_calls" not in more:
        raise ValueError(f"message {number} has no content; fill it or remove the row")
    return {"role": _ROLES[role], "content": _content(content, number), **more}


def _content(value: Any, number: int) -> str:
    """Text, or the text of all parts."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        parts = [part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise ValueError(f"message {number} has a content that is not text; remove images and other parts, or the row")

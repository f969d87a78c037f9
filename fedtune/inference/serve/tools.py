"""Tools: the schemas in requests, and the calls in answers.

A call is read from an answer only in the form that Hermes and Qwen models write: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
"""

import json
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fedtune.inference.serve.objects import Object
from fedtune.storage.parsing import parse_json

MARK = "<tool_call>"
_BLOCK = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(Object):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None  # true would constrain the answer to the schema


class Tool(Object):
    """The schema of a function."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """The tool for chat templates."""
        return self.model_dump(exclude_none=True)


class CalledFunction(Object):
    name: _Name
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _json(cls, arguments: str) -> str:
        if _object(arguments) is None:
            raise ValueError("the 'arguments' of a tool call must be the JSON text of an object")
        return arguments


class ToolCall(Object):
    """A call in a message of the assistant."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Any = None  # present in streamed calls

    def plain(self) -> dict[str, Any]:
        """The call for chat templates, whose arguments are an object."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": _object(self.function.arguments)},
        }


class CallReader:
    """Splits an answer into its text and its calls. An answer of another form is text as it is.

    The form is a text, then one or more blocks `<tool_call>{"name": text, "arguments": object}</tool_call>`, with nothing but white space
    between and after them.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """Add a piece of the answer. Returns the part that is certainly text."""
        held = self._held + text
        at = held.find(MARK)
        if at < 0:
            at = len(held) - next((n for n in range(min(len(held), len(MARK) - 1), 0, -1) if held.endswith(MARK[:n])), 0)
        at = len(held[:at].rstrip())  # white space before a call does not belong to the text
        self._held = held[at:]
        return held[:at]

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls in OpenAI's format."""
        calls, end = [], 0
        while found := _BLOCK.match(self._held, end):
            call, end = _object(found[1]), found.end()
            name, arguments = (call or {}).get("name"), (call or {}).get("arguments", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                return self._held, []
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        return ("", calls) if calls and end == len(self._held) else (self._held, [])


def _object(text: str) -> dict[str, Any] | None:
    """The JSON object of a text; None if it is something else."""
    try:
        found = parse_json(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None

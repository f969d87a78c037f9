"""The process that renders chat templates: reads one JSON request per line, writes one JSON answer per line, and ends at the end of input.

A template comes with its model, and can loop forever or exhaust the memory. Python cannot stop a thread, so a separate process renders
templates: the system kills it after a time limit, and its memory is limited. The script imports almost nothing of fedtune, so it takes
20 MB. It keeps running, so that a request takes only 0.1 ms more than its renderings.

Source: the Jinja environment of transformers' `utils/chat_template_utils.py`.
"""

import json
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from fedtune.storage.parsing import parse_json

SECONDS = 2.0  # CPU time of one rendering
PATIENCE_S = 30.0  # wall-clock time of one rendering; long, because the machine may be busy
MEMORY = 1 << 29  # bytes of address space
LENGTH = 1 << 24  # characters of a rendered chat


def main() -> None:
    """Answer each {"template", "names", "chats", "now", "seconds" of CPU time} with one result per chat.

    A chat has the template's variables `messages`, `tools` and `add_generation_prompt`. A result is {"text", "marks"}, where marks are the
    character ranges [start, end] of `{% generation %}`, or {"refused": reason}, or {"fault": reason}.
    """
    _bound_memory()
    for limit in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(limit, signal.SIG_DFL)  # the default action ends the process
    compiled = lru_cache(maxsize=4)(Template)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        request = parse_json(line)
        answers = []
        for chat in request["chats"]:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            try:
                template = compiled(request["template"])
                messages = [_with_reasoning(m) for m in chat["messages"]]
                variables = {**request["names"], "documents": None, **chat, "messages": messages}
                answers.append(json.dumps(template.render(variables, request["now"])))
            except ImportError as bad:
                answers.append(json.dumps({"fault": f"{bad}: install jinja2"}))
            except MemoryError:
                answers.append(json.dumps({"fault": f"it takes more than {MEMORY >> 20} MB of memory"}))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(f"[{', '.join(answers)}]", flush=True)


def _bound_memory() -> None:
    import resource  # lazy: missing on Windows

    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (OSError, ValueError) as bad:  # macOS refuses limits below the reserved address space
        print(f"fedtune: this system cannot limit the memory of a chat template: {bad}", file=sys.stderr, flush=True)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the two names that templates use."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


class Template:
    """A compiled template; if it does not compile, every rendering is a fault."""

    def __init__(self, source: str) -> None:
        self._refused: list[str] = []
        self._marks: list[tuple[int, int]] = []
        self._length = 0  # characters rendered so far
        self._now: datetime | None = None
        try:
            self._template: Any = self._compile(source)
        except (MemoryError, ImportError):
            raise
        except Exception as bad:  # a template's source can cause any exception
            self._template = bad

    def render(self, variables: dict[str, Any], now: str | None) -> dict[str, Any]:
        """Render with `strftime_now` at `now` (ISO 8601), or at the present time if it is None."""
        self._refused.clear()
        self._marks.clear()
        self._length, pieces = 0, []
        try:
            self._now = None if now is None else datetime.fromisoformat(now)
            if isinstance(self._template, Exception):
                raise self._template
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                self._length += len(piece)
                if self._length > LENGTH:
                    return {"fault": f"its output has more than {LENGTH} characters"}
        except MemoryError:
            raise
        except Exception as bad:  # a template can cause any exception
            return {"refused": self._refused[0]} if self._refused else {"fault": _line(bad)}
        return {"text": "".join(pieces), "marks": self._marks}

    def _compile(self, source: str) -> Any:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def mark(text: str) -> str:
            self._marks.append((self._length, self._length + len(text)))
            return text

        class Generation(jinja2.ext.Extension):
            """`{% generation %}` marks the assistant's text; it renders as its body."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

            def _write(self, caller: Any) -> str:
                return mark(caller())

        class Dict:
            """`dict` without access to Python's class."""

            def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
                return dict(*args, **kwargs)

            def fromkeys(self, *args: Any) -> dict[Any, Any]:
                return dict.fromkeys(*args)

        class Namespace(jinja2.utils.Namespace):
            """`namespace` without names that begin with an underscore."""

            def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805, so that `namespace(self=...)` works
                values = dict(*args[1:], **kwargs)
                for name in values:
                    Namespace._check(name)
                jinja2.utils.Namespace.__init__(args[0], values)

            def __setitem__(self, name: Any, value: Any) -> None:
                Namespace._check(name)
                super().__setitem__(name, value)

            @staticmethod
            def _check(name: Any) -> None:
                if isinstance(name, str) and name.startswith("_"):
                    raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore, such as {name!r}")

        def refuse(message: str) -> None:
            self._refused.append(_line(message))
            raise jinja2.exceptions.TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda format: (self._now or datetime.now()).strftime(format),
            "dict": Dict(),
            "namespace": Namespace,
        }
        return environment.from_string(source)


def _line(bad: object) -> str:
    lines = str(bad).strip().splitlines()
    return lines[0][:120] if lines else type(bad).__name__


if __name__ == "__main__":
    main()

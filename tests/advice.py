"""The advice in fedtune's sentences (errors, notes, help and cards), read from the source."""

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.syntax import nodes

ROOT = Path(__file__).parents[1]
FOLDERS = ("fedtune", "clients", "strategies", "simulations")
HOLE = "\0"  # replaces a value that is known only when the sentence is printed
SETTING = re.compile(r"(?<![\w./\0+-])([a-z_]+(?:\.(?:_target_|[a-z_]+|\0))*)=([^\s,;:)'\"`|\]]*)")
_ONE = r"[a-z_]+(?:\.[a-z_]+)*=[^\s,;:)]+"
_OTHER = r"(?:,? or (?!take|set|add|give|name|leave|raise)\w+(?![\w.=]))*"
FOLLOWS = re.compile(rf"\b(?:set|take|add|give|pick|choose|or|such as)(?: one of)? ({_ONE}(?: {_ONE})*)({_OTHER})")


@dataclass(frozen=True)
class Sentence:
    """A text of more than one word in the source.

    Args:
        where: File and line.
        text: With a `HOLE` for each value.
    """

    where: str
    text: str


def sentences() -> list[Sentence]:
    """All texts that the program may print; docstrings are excluded."""
    return _read()[0]


@functools.cache
def _read() -> tuple[list[Sentence], frozenset[str]]:
    """The sentences, and the locations of the texts of --help, which describe options and give no advice."""
    results, described = [], set[str]()
    for file in (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))):
        name = file.relative_to(ROOT)
        results += [Sentence(f"{name}:{line}", text) for line, text in _texts(nodes(file)) if " " in text.strip()]
        described |= {f"{name}:{line}" for line in _descriptions(nodes(file))}
    return results, frozenset(described)


def _texts(found: Sequence[ast.AST]) -> Iterator[tuple[int, str]]:
    skipped: set[int] = set()
    for node in found:
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            skipped.add(id(node.body[0].value))  # type: ignore[attr-defined]
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node)}
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def ways(sentence: str) -> list[str]:
    """The settings that a printed sentence suggests; each is one alternative.

    `task=instruction or classification` is two ways, `traffic.up=fp32 traffic.topk=null` is one of two settings.
    """
    results = []
    for settings, more in FOLLOWS.findall(sentence):
        key, _, value = settings.partition("=")
        results += [f"{key}={one}" for one in value.split("|")] if " " not in settings else [settings]
        results += [f"{key}={other}" for other in re.findall(r"or (\w+)", more)]
    return [way for way in results if not re.search(r"=(N|NAME|RUN|FILE|VALUE|CLASS)\b", way)]


_VERBS = (
    "accept|add|allow|ask|calibrate|check|chmod|choose|continue|convert|copy|correct|create|delete|distill|download|end|export|fetch|"
    "fill|finish|free|give|go on|install|keep|leave|load|lower|make|mend|merge|move|name|open|pick|pip install|put|quote|raise|read|"
    "reduce|remove|rename|request|restart|restore|resume|retry|run|save|say|see|select|send|set|shorten|start|stop|take|train|try|"
    "update|use|wait|write"
)
_INSTRUCTION = re.compile(
    rf"(?:[:;,(] |\b(?:or|and|then|so) )(?:then )?(?:{_VERBS})\b(?! is)|^(?:give|see|take|keep|then) |\bneeds (?:--|[a-z_]+[.=])"
    r"|\bdid you mean |`fedtune|\bresume=\0"
    r"|^  fedtune-|^fedtune generate|^(?:make|make it) one|^python -m |^fedtune-server |rounds=N",
    re.I,
)


def advice(parts: tuple[str, ...]) -> list[Sentence]:
    """The sentences in these parts of the source that instruct the reader; descriptions of options are excluded."""
    texts, described = _read()
    return [s for s in texts if s.where.startswith(parts) and _INSTRUCTION.search(s.text) and s.where not in described]


def _descriptions(found: Sequence[ast.AST]) -> Iterator[int]:
    for node in found:
        texts = [k.value for k in node.keywords if k.arg in ("help", "description", "epilog")] if isinstance(node, ast.Call) else []
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] in (["about"], ["USAGE"]):
            texts.append(node.value)
        yield from {each.lineno for text in texts for each in ast.walk(text) if isinstance(each, ast.expr)}

"""The part of Go's text/template that Ollama's templates from `ollama_template` use: fixed text, and an evaluator that proves them.

    {{ E }}  {{ $x := E }}  {{ $x = E }}  {{ range $i, $m := .Messages }}  {{ if E }}  {{ else if E }}  {{ else }}  {{ end }}

An expression E is a literal, a variable, `$m.Role`, `$m.Content`, `$.Messages`, `.System`, or `and`, `eq`, `len`, `slice` of expressions.

Source: https://pkg.go.dev/text/template; Ollama passes `System`, `Messages` (with `Role` and `Content`) and `Prompt`.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["evaluate", "fixed_text"]

_ACTION = re.compile(r'{{((?:"(?:[^"\\]|\\.)*"|[^"}]|}(?!}))*)}}')
_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|:=|[(),=]|[^\s(),=:]+)')
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")
Node = str | tuple[str, list[str], list[tuple[list[str], list[Any]]]]  # text, or an action: keyword, words, branches (words, nodes)


def fixed_text(text: str) -> str:
    """A template that prints the text. Quotes, opening braces and what a Modelfile drops (characters that do not print) are escaped."""
    return re.sub(r"[^\n\t -~]|[{\"]", lambda found: found[0] if _printable(found[0]) else _escaped(found[0]), text)


def evaluate(template: str, **values: Any) -> str:
    """Render a template of this subset with Go's rules.

    Args:
        template: The template.
        values: `Messages`, a sequence of {"Role", "Content"}, `System` and `Prompt`; a missing one is empty.

    Raises:
        ValueError: The template is not of this subset.
    """
    nodes, rest = _parse(iter(_pieces(template)))
    if rest:
        raise ValueError(f"an {rest[0]} without its if or range")
    return "".join(_run(nodes, [{}], values))


def _printable(char: str) -> bool:
    return char not in '{"' and unicodedata.category(char)[0] in "LMNPS"


def _escaped(char: str) -> str:
    code = ord(char)
    return '{{ "' + (f"\\x{code:02x}" if code < 128 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}") + '" }}'


def _pieces(template: str) -> Iterator[str | list[str]]:
    """Text, and the words of each action."""
    end = 0
    for found in _ACTION.finditer(template):
        if found.start() > end:
            yield template[end : found.start()]
        words = _WORD.findall(found[1])
        if "".join(words) != re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", found[1]) or not words:
            raise ValueError(f"an action that is not of the subset: {found[0]}")
        yield words
        end = found.end()
    if "{{" in template[end:]:
        raise ValueError("an action that does not end")
    if template[end:]:
        yield template[end:]


def _parse(pieces: Iterator[str | list[str]]) -> tuple[list[Node], list[str]]:
    """Nodes up to an `else` or `end`, and its words."""
    nodes: list[Node] = []
    for piece in pieces:
        if isinstance(piece, str):
            nodes.append(piece)
        elif piece[0] in ("else", "end"):
            return nodes, piece
        elif piece[0] in ("if", "range"):
            branches, words = [], piece
            while words != ["end"]:
                inner, after = _parse(pieces)
                branches.append((words[1:] if words[0] in ("if", "range") else words[2:], inner))
                if not after or (piece[0] == "range" and after != ["end"]):
                    raise ValueError(f"a {piece[0]} without its end")
                words = after
            nodes.append((piece[0], piece, branches))
        else:
            nodes.append(("print" if ":=" not in piece and "=" not in piece else "set", piece, []))
    return nodes, []


def _run(nodes: Sequence[Node], scopes: list[dict[str, Any]], values: Mapping[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
            continue
        kind, words, branches = node
        if kind == "print":
            yield str(_value(words, scopes, values))
        elif kind == "set":
            name, how, *rest = words
            scope = scopes[-1] if how == ":=" else next(s for s in reversed(scopes) if name in s)
            scope[name] = _value(rest, scopes, values)
        elif kind == "if":
            taken = next((inner for own, inner in branches if not own or _value(own, scopes, values)), [])
            yield from _run(taken, [*scopes, {}], values)
        else:
            (((index, comma, item, declares, *rest), inner),) = branches
            if (comma, declares) != (",", ":="):
                raise ValueError(f"a range of another form: {words}")
            for i, message in enumerate(_value(rest, scopes, values)):
                yield from _run(inner, [*scopes, {index: i, item: message}], values)


def _value(words: Sequence[str], scopes: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> Any:
    left = list(words)
    found = _call(left, scopes, values)
    if left:
        raise ValueError(f"more words than one expression: {' '.join(words)}")
    return found


def _call(left: list[str], scopes: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> Any:
    """The value of one function with its arguments, or of one operand, taken from the front of `left`."""
    if left[0] not in ("and", "eq", "len", "slice"):
        return _operand(left, scopes, values)
    name, given = left.pop(0), list[Any]()
    while left and left[0] != ")":
        given.append(_operand(left, scopes, values))
    if name == "and":
        return next((value for value in given[:-1] if not value), given[-1])
    if name == "eq":
        return given[0] == given[1]
    return len(given[0]) if name == "len" else given[0][given[1] :]


def _operand(left: list[str], scopes: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> Any:
    word = left.pop(0)
    if word == "(":
        found = _call(left, scopes, values)
        if not left or left.pop(0) != ")":
            raise ValueError("a bracket that does not close")
        return found
    if word[0] == '"':
        return _ESCAPE.sub(lambda code: chr(int(next(filter(None, code.groups())), 16)), word[1:-1])
    if word.isdigit():
        return int(word)
    if word in ("true", "false"):
        return word == "true"
    name, _, field = word.partition(".")
    if name in ("", "$"):
        return values.get(field, "")
    for scope in reversed(scopes):
        if name in scope:
            return scope[name][field] if field else scope[name]
    raise ValueError(f"'{word}' is not known")

"""Frozen dataclasses from what a peer sent, which may be anything: every field known, every value of its type and finite."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fedtune.parsing import parse_json

T = TypeVar("T")
_SCALARS = (str, int, float, bool, types.NoneType)


def read_object(kind: type[T], text: str, error: type[Exception], what: str, **given: Any) -> T:
    """An instance of a dataclass from a JSON object.

    Args:
        kind: The dataclass.
        text: JSON.
        error: What is raised.
        what: What the text is, for the sentence.
        given: Fields that the text does not hold.

    Raises:
        Exception: `error`, with the first thing that is wrong.
    """
    try:
        raw = parse_json(text)
    except ValueError as bad:
        raise error(f"the {what} is not JSON: {str(bad)[:80]}") from None
    if not isinstance(raw, dict):
        raise error(f"the {what} must be a JSON object, got {type(raw).__name__}")
    return kind(**read_fields(kind, raw, error, what, skip=given), **given)


def read_fields(
    kind: type, raw: Mapping[str, Any], error: type[Exception], what: str, skip: Mapping[str, Any] = types.MappingProxyType({})
) -> dict[str, Any]:
    """The values of a dataclass's fields from a mapping; fields with a default may be missing, and those in `skip` must be.

    Raises:
        Exception: `error`, with the first thing that is wrong.
    """
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind) if f.name not in skip}
    if unknown := sorted(set(raw) - set(fields)):
        raise error(f"the {what} has the unknown field '{unknown[0][:60]}': the peers run different versions of fedtune")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in raw:
            good, values[name] = _read(hints[name], raw[name])
            if not good:
                wanted = getattr(hints[name], "__name__", hints[name])
                raise error(f"the {what}'s {name} is {str(raw[name])[:60]!r}, which is not of its type ({wanted})")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"the {what} lacks the field '{name}'")
    return values


def _read(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether a JSON value is of this type, and the value as that type."""
    if hint == tuple[str, ...]:
        good = isinstance(value, list) and all(isinstance(v, str) for v in value)
        return good, tuple(value) if good else value
    if typing.get_origin(hint) is Mapping:
        inner = typing.get_args(hint)[1]
        return isinstance(value, dict) and (inner != SCALAR or all(_is_scalar(v) for v in value.values())), value
    kinds = typing.get_args(hint) or (hint,)
    allowed = {*kinds, int} if float in kinds else set(kinds)
    return type(value) in allowed and _is_finite(value), value


def _is_scalar(value: Any) -> bool:
    return type(value) in _SCALARS and _is_finite(value)


def _is_finite(value: Any) -> bool:
    return not (isinstance(value, float) and not math.isfinite(value))


SCALAR = str | int | float | bool | None

__all__ = ["SCALAR", "read_fields", "read_object"]

"""Reads frozen dataclasses from untrusted JSON: all fields must be known, and all values finite and of the field's type.

A field's type may be a string, a number, a bool, None, `Any`, a `Literal`, a tuple, a `Mapping` with string keys, another dataclass, or a
union of these. An integer is valid for a `float` field; a bool is not a number.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar

from fedtune.storage.ids import shown
from fedtune.storage.parsing import parse_json

T = TypeVar("T")
SCALAR = str | int | float | bool | None
_NUMBERS: dict[Any, tuple[type, ...]] = {float: (float, int), int: (int,), str: (str,), bool: (bool,), NoneType: (NoneType,)}


def read_object(kind: type[T], text: str | bytes, error: type[Exception], what: str, **given: Any) -> T:
    """Read an instance of a dataclass from a JSON object.

    Args:
        kind: The dataclass.
        text: JSON.
        error: Exception class to raise.
        what: Name of the object in the error.
        given: Fields that are not in the text.

    Raises:
        Exception: An `error` that names the first fault.
    """
    try:
        raw = parse_json(text)
    except ValueError as bad:
        raise error(f"the {what} is not JSON: {str(bad)[:80]}") from None
    return kind(**read_fields(kind, raw, error, what, skip=given), **given)


def read_fields(
    kind: type, raw: Any, error: type[Exception], what: str, *, skip: Mapping[str, Any] = MappingProxyType({}), others: bool = False
) -> dict[str, Any]:
    """Read the values of a dataclass's fields from a mapping. Fields with a default may be missing.

    Args:
        kind: The dataclass.
        raw: The mapping; any other type is an error.
        error: Exception class to raise.
        what: Name of the mapping in the error.
        skip: Fields that the mapping must not have.
        others: Ignore unknown fields instead of refusing them.

    Raises:
        Exception: An `error` that names the first fault.
    """
    if not isinstance(raw, Mapping):
        raise error(f"the {what} must be a JSON object, got {type(raw).__name__}")
    hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind) if f.name not in skip}
    if not others and (unknown := sorted(set(raw) - set(fields))):
        raise error(f"the {what} has the unknown field '{unknown[0][:60]}': the peers run different versions of fedtune")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in raw:
            try:
                values[name] = _value(hints[name], raw[name])
            except _Misfit as bad:
                label, came = (name, repr(str(bad.raw)[:60])) if bad.key is None else (shown(bad.key), shown(str(bad.raw)))
                raise error(f"the {what}'s {label} is {came}, which is not of type {bad.wanted}") from None
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"the {what} lacks the field '{name}'")
    return values


class _Misfit(Exception):
    """A value of a wrong type; `key` is its key if it is in a mapping."""

    def __init__(self, hint: Any, raw: Any, key: str | None = None) -> None:
        super().__init__()
        self.wanted = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
        self.raw, self.key = raw, key


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(hint: Any, raw: Any) -> Any:
    """Convert a JSON value to this type.

    Raises:
        _Misfit: The value has another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return raw
    if origin in (UnionType, typing.Union):
        for one in args:
            try:
                return _value(one, raw)
            except _Misfit:
                continue
    elif origin is Literal:
        if any(type(raw) is type(one) and raw == one for one in args):
            return raw
    elif origin is tuple and isinstance(raw, list):
        kinds = args[:1] * len(raw) if args[1:] == (...,) else args
        if len(kinds) == len(raw):
            return tuple(_value(one, value) for one, value in zip(kinds, raw, strict=True))
    elif origin is Mapping and isinstance(raw, Mapping):
        return {key: _named(args[1], value, key) for key, value in raw.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(raw, Mapping):
        try:
            return typing.cast(Any, hint)(**read_fields(typing.cast(type, hint), raw, ValueError, ""))
        except ValueError:
            pass
    elif type(raw) in _NUMBERS.get(hint, ()) and not (isinstance(raw, float) and not math.isfinite(raw)):
        return raw
    raise _Misfit(hint, raw)


def _named(hint: Any, raw: Any, key: str) -> Any:
    try:
        return _value(hint, raw)
    except _Misfit as bad:
        raise _Misfit(hint, bad.raw, key) from None


__all__ = ["SCALAR", "read_fields", "read_object"]

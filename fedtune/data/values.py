"""Values of the source's columns as text, numbers and class ids, and templates that join several columns."""

import contextlib
import datetime
import decimal
import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.contracts.rows import RowSet
from fedtune.data.messages import ALPACA, ALPACA_OPTIONAL
from fedtune.errors import ConfigError, DataError
from fedtune.storage.parsing import parse_json

_TYPES: dict[type, str] = {str: "string", int: "int64", float: "double", bool: "bool"}


def typed(values: list[Any]) -> tuple[list[Any], str]:
    """A column's values as Arrow stores them, and Arrow's name of their type. Only lists, mappings, dates and mixed types load Arrow.

    Raises:
        UnicodeEncodeError: A string has half a surrogate pair.
        TypeError, ValueError, OverflowError: Arrow has no type for all values.
    """
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return values, "null"
    if len(kinds) == 1 and (name := _TYPES.get(kind := kinds.pop())):
        if kind is str:
            for value in values:
                if value is not None and not value.isascii():
                    value.encode()
            return values, name
        if kind is not int or all(-(2**63) <= value < 2**63 for value in values if value is not None):
            return values, name
    import pyarrow as pa

    array = pa.array(values)
    return array.to_pylist(), str(array.type)


def fields(template: str, what: str) -> set[str]:
    """The columns in a template.

    Raises:
        ConfigError: The template is malformed.
    """
    try:
        return {name.split(".")[0].split("[")[0] for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as bad:
        raise ConfigError(f"{what} {template!r} is malformed ({bad}): write a literal brace twice") from None


class _Values(string.Formatter):
    """str.format that accepts only values with a text form."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        value, used = super().get_field(field_name, args, kwargs)
        if not has_text(value):
            raise DataError(f"'{field_name}' is {_shown(value)}: {_advice(field_name, value)}")
        return value, used


def fill(template: str, source: RowSet, what: str) -> list[str]:
    """`template` formatted for every row by str.format; raises DataError for a field without a text form."""
    used, formatter = sorted(fields(template, what)), _Values()
    columns = [source[name][:] for name in used]
    out = []
    for number in range(len(source)):
        row = {name: column[number] for name, column in zip(used, columns, strict=True)}
        if empty := [name for name, value in row.items() if value is None]:
            raise DataError(f"{what} {template!r} needs '{empty[0]}', but row {number + 1} has none: fill it or remove the row")
        try:
            out.append(formatter.vformat(template, (), row))
        except DataError as bad:
            raise DataError(f"{what} {template!r} cannot be filled from row {number + 1}: {bad}") from None
        except (ValueError, IndexError, KeyError, AttributeError, TypeError) as bad:
            raise DataError(f"{what} {template!r} cannot be filled from row {number + 1} ({type(bad).__name__}: {bad})") from None
    return out


def has_text(value: Any) -> bool:
    """Whether a value has a text form: a string, a finite number, a date or a time. Python's repr of other values is no text."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int, decimal.Decimal, datetime.date, datetime.time))


def _shown(value: Any) -> str:
    return "empty" if value is None else f"not a number ({value})" if isinstance(value, float) else f"a {type(value).__name__}"


def _advice(field: str, value: Any) -> str:
    """The way out for a field with `value`: a part of it with a text form, if there is one."""
    part = _part(field, value)
    return f"name a part that is text, such as '{part}'" if part else "fill it or remove the row"


def _part(field: str, value: Any) -> str:
    """A template field for a part of `value` with a text form, such as {field[0]}; "" if there is none."""
    inner, path = value, field
    while isinstance(inner, (Mapping, list)) and inner:
        key: Any = 0 if isinstance(inner, list) else next((k for k in ("content", "text", "value") if k in inner), next(iter(inner)))
        inner, path = inner[key], f"{path}[{key}]"
    return f"{{{path}}}" if path != field and has_text(inner) else ""


def texts(values: Sequence[Any], ours: str, theirs: str) -> list[str]:
    """Values as strings; numbers and dates are converted, lists, mappings and non-finite numbers raise DataError."""
    for number, value in enumerate(values, 1):
        if isinstance(value, (Mapping, list)):
            part, advice = _part(theirs, value), "fill it or remove the row"
            if part and ours not in (*ALPACA, *ALPACA_OPTIONAL):
                advice = f"""name a part that is text, such as 'data.columns.{ours}="{part}"'"""
            elif part:
                asked = {"instruction": part, "output": "{instruction}", "system": f"{part} {{instruction}}"}
                prompt, answer = asked.get(ours, f"{{instruction}} {part}"), part if ours == "output" else "{output}"
                advice = f"""take templates with a part that is text, such as 'data.prompt="{prompt}"' 'data.answer="{answer}"'"""
            raise DataError(f"column '{theirs}' has {type(value).__name__} values, but '{ours}' must be text: {advice}")
        if not has_text(value):
            raise DataError(f"row {number} of column '{theirs}' is {_shown(value)}, but '{ours}' must be text: fill it or remove the row")
    return [value if isinstance(value, str) else str(value) for value in values]


LARGEST = 1e18  # of a number: float32 holds its square


def numbers(values: Sequence[Any], ours: str, theirs: str) -> list[float]:
    """Values as finite numbers; numeric strings are converted."""
    out = []
    for number, value in enumerate(values, 1):
        try:
            out.append(float(value))
        except (TypeError, ValueError, OverflowError):
            out.append(math.nan)
        if not abs(out[-1]) <= LARGEST:
            raise DataError(
                f"row {number} of column '{theirs}' is {str(value)[:40]!r}, but '{ours}' must be a number of at most 1e18:"
                " correct it or remove the row"
            )
    return out


def vectors(values: Sequence[Any], ours: str, theirs: str, size: int) -> list[list[float]]:
    """Values as lists of `size` finite numbers: numbers, lists of numbers, or the JSON text of a list."""
    rows = [as_list(value) for value in values]
    for number, row in enumerate(rows, 1):
        if len(row) != size:
            raise DataError(
                f"row {number} of column '{theirs}' has {len(row)} numbers, but task.outputs={size}: set task.outputs to the numbers of"
                " each row"
            )
    columns = [numbers([row[i] for row in rows], ours, theirs) for i in range(size)]
    return [list(row) for row in zip(*columns, strict=True)]


def as_list(value: Any) -> list[Any]:
    """A list, the JSON text of a list, or a single value as a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def label_sets(values: Sequence[Any], declared: tuple[str, ...] | None, what: str) -> list[list[str]]:
    """The class names of every value: a list, its JSON text, or names separated by commas, semicolons or bars."""
    out = []
    for number, value in enumerate(values, 1):
        found = as_list(value)
        if found == [value] and isinstance(value, str):
            if value.lstrip().startswith("["):
                raise DataError(f'{what} row {number} has the labels {value[:40]!r}, which are not a JSON list: write ["a", "b"] or a, b')
            found = [name for name in re.split("[,;|]", value) if name.strip()]
        out.append(names_of(found, declared, what, number))
    return out


def names_of(values: Sequence[Any], declared: tuple[str, ...] | None, what: str, row: int | None = None) -> list[str]:
    """The stripped class name of every value.

    Whole numbers are ids of `declared`, the names of a ClassLabel feature, if the source has one. With `row`, all values are those of one
    row, of this number.
    """
    for number, value in enumerate(values, 1):
        number = row or number
        if not isinstance(value, (bool, int, str)):
            shown = f"{type(value).__name__} {str(value)[:40]}"
            raise DataError(f"{what} row {number} has the label {shown}, but a label is a name or a whole number: see data.columns.label")
        if isinstance(value, str) and not value.strip():
            raise DataError(f"{what} row {number} has an empty label: fill it or remove the row; see data.columns.label")
        if declared is not None and not 0 <= int(value) < len(declared):
            raise DataError(f"{what} row {number} has class id {value}, but there are {len(declared)} classes: remove the row")
    return [str(value).strip() if declared is None else declared[int(value)] for value in values]


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """The class names in the order of their ids: sorted as text, or by value and then as text if all are whole numbers."""
    unique = sorted(set(names))
    return tuple(sorted(unique, key=int) if all(name.removeprefix("-").isdecimal() for name in unique) else unique)


def to_bits(values: Sequence[Sequence[str]], names: tuple[str, ...], what: str) -> list[bytes]:
    """For every row one byte for each class, 1 if the row has it. Raises DataError as `to_ids` does."""
    out = []
    for number, row in enumerate(values, 1):
        ids = set(to_ids(row, names, what, number))
        out.append(bytes(i in ids for i in range(len(names))))
    return out


def to_ids(values: Sequence[str], names: tuple[str, ...], what: str, row: int | None = None) -> list[int]:
    """The class id of every value; `row` as in `names_of`.

    Raises:
        DataError: A value is not in `names`.
    """
    ids = {name: i for i, name in enumerate(names)}
    for number, value in enumerate(values, 1):
        if value not in ids:
            shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
            raise DataError(
                f"{what} row {row or number} has the label '{value}', but the classes are {shown}: correct it or remove the row"
            )
    return [ids[value] for value in values]

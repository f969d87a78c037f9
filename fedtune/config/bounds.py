"""One range check, with one form of error sentence, for settings, parameters of turns and fields of plans."""

import math
from collections.abc import Collection
from typing import Any

from fedtune.errors import ConfigError
from fedtune.storage.ids import shown


def require(
    name: str,
    value: Any,
    error: type[Exception] = ConfigError,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Collection[str] = (),
) -> None:
    """Check one value. None means unset and is allowed; NaN violates every bound.

    Args:
        name: Name of the value in the error. Names of command-line options begin with `--`.
        value: The value.
        error: Exception class to raise.
        ge: The value must be greater than or equal to this.
        gt: The value must be greater than this.
        le: The value must be less than or equal to this.
        lt: The value must be less than this; infinity allows every finite number.
        choices: Allowed texts.

    Raises:
        Exception: An `error` that names the first violated bound.
    """
    if value is None:
        return
    if choices and value not in choices:
        raise error(f"{_came(name, value)} is not known: choose one of {', '.join(choices)}")
    for word, bound, good in (
        ("at least", ge, lambda v, b: v >= b),
        ("greater than", gt, lambda v, b: v > b),
        ("at most", le, lambda v, b: v <= b),
        ("less than", lt, lambda v, b: v < b),
    ):
        if bound is not None and not good(value, bound):
            raise error(f"{_came(name, value)} is out of range: it must be {'finite' if math.isinf(bound) else f'{word} {bound:g}'}")


def _came(name: str, value: Any) -> str:
    """The name and the value, as the user wrote them."""
    text = f"{value:g}" if name.startswith("--") and isinstance(value, float) else shown(str(value))
    return f"{name}{' ' if name.startswith('--') else '='}{text}"


__all__ = ["require"]

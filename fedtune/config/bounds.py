"""The values that a setting, a parameter of a turn or a field of a plan may have: one judge for all, and one form of sentence."""

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
    """Check one value. None is a value that was not set, and is allowed; NaN is out of all bounds.

    Args:
        name: What the value is called in the sentence. A name that begins with `--` is an option's.
        value: The value.
        error: What is raised.
        ge: Least value.
        gt: Largest number that is too small.
        le: Largest value.
        lt: Smallest number that is too large; infinity allows every finite number.
        choices: The texts that are allowed.

    Raises:
        Exception: `error`, with the first bound that is violated.
    """
    if value is None:
        return
    text = f"{value:g}" if name.startswith("--") and isinstance(value, float) else shown(str(value))
    came = f"{name}{' ' if name.startswith('--') else '='}{text}"
    if choices and value not in choices:
        raise error(f"{came} is not known: choose one of {', '.join(choices)}")
    for word, bound, good in (
        ("at least", ge, lambda v, b: v >= b),
        ("greater than", gt, lambda v, b: v > b),
        ("at most", le, lambda v, b: v <= b),
        ("less than", lt, lambda v, b: v < b),
    ):
        if bound is not None and not good(value, bound):
            raise error(f"{came} is out of range: it must be {'finite' if math.isinf(bound) else f'{word} {bound:g}'}")


__all__ = ["require"]

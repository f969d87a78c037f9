"""Which cases of a long table run in the quick suite."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The cases; all except `chosen` are slow. An unknown name in `chosen` is an error.

    One of each kind stays: what breaks all of a kind is seen in the quick suite, what breaks a single case in the slow one.
    """
    cases = list(cases)
    if strange := [case for case in chosen if case not in cases]:
        raise ValueError(f"{strange} are no cases of {cases}")
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [pytest.mark.kind if case in chosen else pytest.mark.slow for case in cases]
    return [pytest.param(*each, marks=[mark]) for each, mark in zip(values, marks, strict=True)]

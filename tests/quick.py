"""Which cases of a long table run in the quick suite."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The cases; all except `chosen` are slow. An unknown name in `chosen` is an error.

    One of each kind stays: what breaks all of a kind is seen in the quick suite, what breaks a single case in the slow one.
    """
    cases = [case if hasattr(case, "marks") else pytest.param(*_values(case)) for case in cases]
    wanted = [_values(case) for case in chosen]
    if strange := [case for case in wanted if case not in [each.values for each in cases]]:
        raise ValueError(f"{strange} are no cases of {[each.values for each in cases]}")
    marks = [pytest.mark.kind if case.values in wanted else pytest.mark.slow for case in cases]
    return [pytest.param(*case.values, marks=[*case.marks, mark], id=case.id) for case, mark in zip(cases, marks, strict=True)]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)

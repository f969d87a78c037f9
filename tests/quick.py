"""Which cases of a long table run in the quick suite."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """The cases, with all except `chosen` marked as slow. An unknown case in `chosen` is an error.

    Choose one case of each kind: the quick suite then detects errors of a whole kind, the slow suite those of a single case.
    """
    cases = [case if hasattr(case, "marks") else pytest.param(*_values(case)) for case in cases]
    wanted = [_values(case) for case in chosen]
    if strange := [case for case in wanted if case not in [each.values for each in cases]]:
        raise ValueError(f"{strange} are not cases of {[each.values for each in cases]}")
    marks = [pytest.mark.kind if case.values in wanted else pytest.mark.slow for case in cases]
    return [pytest.param(*case.values, marks=[*case.marks, mark], id=case.id) for case, mark in zip(cases, marks, strict=True)]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)

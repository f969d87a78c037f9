"""What is said of the scores of many clients, the same in the round loop and in the reports."""

import math
from collections.abc import Sequence


def worst_decile(values: Sequence[float], *, higher_is_better: bool) -> float | None:
    """Mean of the worst ⌈n/10⌉ of n values; None where there are none."""
    worst = sorted(values, reverse=not higher_is_better)[: math.ceil(len(values) / 10)]
    return sum(worst) / len(worst) if worst else None

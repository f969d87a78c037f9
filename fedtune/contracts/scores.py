"""Statistics over many clients' scores, shared by the round loop and the reports."""

import math
from collections.abc import Sequence


def worst_decile(values: Sequence[float], *, higher_is_better: bool) -> float | None:
    """Mean of the worst ⌈n/10⌉ of n values; None if there are no values."""
    worst = sorted(values, reverse=not higher_is_better)[: math.ceil(len(values) / 10)]
    return sum(worst) / len(worst) if worst else None

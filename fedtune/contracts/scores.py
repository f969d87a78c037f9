"""Statistics over many clients' scores, shared by the round loop and the reports."""

import math
from collections.abc import Sequence


def worst_decile(values: Sequence[float], *, higher_is_better: bool) -> float | None:
    """Mean of the worst ⌈n/10⌉ of n values; None if there are no values."""
    worst = sorted(values, reverse=not higher_is_better)[: math.ceil(len(values) / 10)]
    return sum(worst) / len(worst) if worst else None


SHARED = "shared_"  # prefix of the scores of the adapter that all clients share, beside those of a client's personal one


def personal_gain(pairs: Sequence[tuple[float, float]], *, higher_is_better: bool) -> dict[str, float]:
    """What clients gain from their personal adapters, given each client's (personal score, score of the shared adapter).

    Returns:
        `clients_shared_mean`; `clients_gain`, the mean difference, positive if the personal adapter is better; its worst decile; and
        `clients_better` and `clients_worse`, numbers of clients. Empty without clients.
    """
    if not pairs:
        return {}
    sign = 1.0 if higher_is_better else -1.0
    gains = [sign * (own - shared) for own, shared in pairs]
    return {
        "clients_shared_mean": sum(shared for _, shared in pairs) / len(pairs),
        "clients_gain": sum(gains) / len(gains),
        "clients_gain_worst_decile": worst_decile(gains, higher_is_better=True) or 0.0,
        "clients_better": float(sum(gain > 0 for gain in gains)),
        "clients_worse": float(sum(gain < 0 for gain in gains)),
    }

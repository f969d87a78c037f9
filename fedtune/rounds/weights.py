"""How much of a round one client may be: its weight is the number of rows that it claims, and nobody can look them up.

A weight is w_k = min(n_k, τ), with the largest τ for which no w_k is more than the share s of the cohort's sum:

    τ = s·R / (1 − s·c),   c: clients above τ,   R: sum of the n_k of the others

In a cohort of m clients s is at least 1/m: less would leave nobody a weight. The sum is over those that are asked, as their hellos count
them, for updates are folded one at a time as they come; where some do not answer, the share of each of the others is larger.
"""

from collections.abc import Iterable
from fractions import Fraction

from fedtune.config import WeightsConfig

_EQUAL_SHARES, _MOST = 3, Fraction(1, 2)


def share_of(config: WeightsConfig, clients: int, *, engine: bool) -> Fraction | None:
    """The largest share of one of so many clients; None bounds nobody.

    Where the config leaves it open, a client on a network may have three equal shares, and never more than all the others together. An
    engine's clients count their own rows, so that none of them can lie.
    """
    if config.max_share is None and engine:
        return None
    share = min(Fraction(_EQUAL_SHARES, max(clients, 1)), _MOST) if config.max_share is None else Fraction(config.max_share)
    return max(share, Fraction(1, max(clients, 1)))


def heaviest(counts: Iterable[int], share: Fraction) -> int:
    """τ, rounded down, for clients with so many rows each: no w_k is more than `share` of Σ w_k.

    Args:
        counts: n_k of the cohort; who has none has no weight.
        share: s, at least 1 / (clients with rows).
    """
    falling = sorted((n for n in counts if n > 0), reverse=True)
    rest = sum(falling)
    for above, n in enumerate(falling):
        limit = share * rest / (1 - share * above) if share * above < 1 else Fraction(falling[-1])
        if n <= limit:
            return min(int(limit), falling[0])
        rest -= n
    return falling[-1] if falling else 0

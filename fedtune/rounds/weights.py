"""Limits one client's share of a round, because its weight is the row count that it reports, which the server cannot verify.

The weight is w_k = min(n_k, τ), with the largest τ for which no w_k exceeds the share s of the cohort's sum:

    τ = s·R / (1 − s·c),   c: number of clients with n_k > τ,   R: sum of the n_k of the others

In a cohort of m clients, s is at least 1/m, because no weights satisfy a smaller share. Updates are aggregated one at a time, so the sum
uses the row counts from the hellos of all selected clients. If some do not answer, the others' shares grow.
"""

from collections.abc import Iterable
from fractions import Fraction

from fedtune.config import WeightsConfig

_EQUAL_SHARES, _MOST = 3, Fraction(1, 2)


def largest_share(config: WeightsConfig, clients: int, *, engine: bool) -> Fraction | None:
    """The largest share of one client among `clients` clients; None sets no limit.

    The default on a network is 3 / `clients`, at most 1/2: no client outweighs all others together. A simulation's clients cannot misreport
    their rows, so the default there is no limit.
    """
    if config.max_share is None and engine:
        return None
    share = min(Fraction(_EQUAL_SHARES, max(clients, 1)), _MOST) if config.max_share is None else Fraction(config.max_share)
    return max(share, Fraction(1, max(clients, 1)))


def max_weight(counts: Iterable[int], share: Fraction) -> int:
    """τ, rounded down, for clients with these row counts: no w_k exceeds `share` of Σ w_k.

    Args:
        counts: n_k of the cohort; a client without rows has no weight.
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

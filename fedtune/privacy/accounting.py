"""Privacy accounting: the ε of a sequence of noisy sums at δ, and the noise for a given ε.

Every mechanism is the Gaussian mechanism on a sum over a Poisson sample: at record level over a client's rows (rate q = B / n_k), at user
level over the cohort (rate 1: fixed-size cohorts are not Poisson samples, so no amplification is claimed).

Sources: Mironov et al. 2019, Rényi Differential Privacy of the Sampled Gaussian Mechanism, arXiv:1908.10530 (rdp); Gopi et al. 2021,
Numerical Composition of Differential Privacy, arXiv:2106.02848 (prv, also an upper bound, and tighter). Opacus implements both.
"""

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from fedtune.errors import ConfigError

_MAX_EPSILON = 200.0  # beyond this PRV's grid exceeds memory and ε is meaningless, so the RDP bound is used


@dataclass(frozen=True, kw_only=True)
class Spend:
    """Noisy sums of one kind.

    Args:
        noise: Standard deviation of the noise as a multiple of the sum's sensitivity.
        rate: Probability that a row (or client) is in a sum, independently of the others.
        steps: Number of sums.
    """

    noise: float
    rate: float
    steps: int


def epsilon(spent: Iterable[Spend], delta: float, accountant: str = "prv") -> float:
    """An upper bound of the total ε at δ of `spent`; 0 for nothing, infinite without noise."""
    steps: dict[tuple[float, float], int] = {}
    for s in spent:
        if s.steps and s.rate > 0:
            steps[s.noise, s.rate] = steps.get((s.noise, s.rate), 0) + s.steps
    if not steps:
        return 0.0
    if any(noise <= 0 for noise, _ in steps):
        return math.inf
    return _epsilon(tuple(sorted((noise, rate, n) for (noise, rate), n in steps.items())), delta, accountant)


def at_least(cost: Spend, epsilon: float, delta: float) -> bool:
    """Whether `epsilon` at δ can be the cost of `cost` or more: False if its first sum alone costs more. It uses a closed form, not an
    accountant, so that a server can check every reply.

    For one sum, δ(ε) = q · δ_G(ln(1 + (e^ε − 1) / q)) with δ_G(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ): Balle et al. 2018,
    Privacy Amplification by Subsampling, arXiv:1807.01647, theorem 9; Balle & Wang 2018, Improving the Gaussian Mechanism,
    arXiv:1805.06530, theorem 5.
    """
    if not (cost.steps and cost.rate > 0):
        return epsilon >= 0
    if cost.noise <= 0:
        return epsilon == math.inf
    if epsilon > _MAX_EPSILON:
        return True  # e^ε would overflow, and such an ε is meaningless
    eps, half = math.log1p(math.expm1(epsilon) / cost.rate), 1 / (2 * cost.noise)
    far, near = half - eps * cost.noise, -half - eps * cost.noise
    return cost.rate * (_normal(far) - math.exp(eps) * _normal(near)) <= delta * (1 + 1e-6)


def _normal(x: float) -> float:
    """Φ."""
    return math.erfc(-x / math.sqrt(2)) / 2


@lru_cache(maxsize=4096)
def solve_noise(epsilon: float, delta: float, rate: float, steps: int, accountant: str = "prv") -> float:
    """The noise multiplier with which `steps` steps cost at most ε at δ (and at least ε − .01, or .99 ε).

    Raises:
        ConfigError: No noise is sufficient.
    """
    from opacus.accountants.utils import MAX_SIGMA, get_noise_multiplier  # imports torch, which a ledger does not need

    most = 20.0 * 2 ** int(math.log2(MAX_SIGMA / 20))  # the last that the search tries; the smaller ones before it take minutes
    if (least := _epsilon(((most, rate, steps),), delta, accountant)) > epsilon:
        reason = f"{most:g} times the sensitivity, the most, gives ε = {least:.2g}"
    else:
        try:
            with _quiet():
                return get_noise_multiplier(
                    target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant=accountant,
                    epsilon_tolerance=min(0.01, epsilon / 100),
                )  # fmt: skip
        except ValueError as bad:
            reason = str(bad)[:60]
    raise ConfigError(
        f"no noise keeps privacy.epsilon={epsilon:g} at privacy.delta={delta:g} over {steps} steps ({reason}):"
        " raise privacy.epsilon or privacy.delta"
    )


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    from opacus.accountants import create_accountant

    if accountant == "prv" and (bound := _epsilon(history, delta, "rdp")) > _MAX_EPSILON:
        return bound
    made = create_accountant(accountant)
    made.history = list(history)
    with _quiet():
        return float(made.get_epsilon(delta))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings: Opacus divides by zero on purpose at rate 1, and reports its best order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""User-level privacy: what one client as a whole can change.

    Δ_k ← Δ_k · min(1, C / ‖Δ_k‖)            ‖·‖ over all tensors sent together
    server:  Δ ← ( Σ_k Δ_k + N(0, (zC)²I) ) / m        m: the cohort that was planned, whoever came; every client weighs the same
    client:  Δ_k ← Δ_k + N(0, (zC)²I), before it leaves

At the server the adjacency is zero-out: neighbors differ in one client, whose Δ_k is replaced by zero, with m the same for both. This moves
the sum by at most C. At the client, where the peer sees each Δ_k, the neighbor is a client with any other data: it moves by up to 2C, so
that what is counted is z / 2.

Adaptive C tracks the γ-quantile of the norms:

    b_k = 1[‖Δ_k‖ ≤ C]      b̃ = ½ + (Σ_k (b_k − ½) + N(0, σ_b²)) / m      C ← C · exp(−η (b̃ − γ))

The noise of the round is drawn for the old C. One bit moves its sum by ½; with z_Δ = (z⁻² − (2σ_b)⁻²)^−½ on the tensors, both together
cost what z alone would.

Sources: McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, arXiv:1710.06963; Andrew et al. 2021,
Differentially Private Learning with Adaptive Clipping, arXiv:1905.03871, algorithm 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedtune.errors import ConfigError
from fedtune.privacy.noise import Source


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """The quantile tracker's settings.

    Args:
        quantile: γ, the share of norms that C is to lie above.
        rate: η.
        noise: σ_b as a share of the cohort m.
    """

    quantile: float = 0.5
    rate: float = 0.2
    noise: float = 0.05

    def next(self, clip: float, under: int, came: int, cohort: int, source: Source) -> float:
        """C of the next round, where `under` of the `came` clients had a norm of at most `clip`."""
        drawn = float(source.normal((1,), self.noise * cohort))
        share = 0.5 + (under - came / 2 + drawn) / cohort
        return clip * math.exp(-self.rate * (share - self.quantile))

    def left(self, noise: float, cohort: int) -> float:
        """z_Δ: what the tensors get, so that tensors and bits together cost what z alone would.

        Raises:
            ConfigError: The bits alone cost more.
        """
        bits = 2 * self.noise * cohort
        if not bits > noise:
            raise ConfigError(
                f"adaptive clipping with a noise multiplier of {noise:.3g} needs more noise on its bits than {bits:.3g}: raise"
                " privacy.bit_noise or clients_per_round"
            )
        return 0.0 if noise == 0 else (noise**-2 - bits**-2) ** -0.5


def norm(delta: Mapping[str, Tensor]) -> float:
    """‖Δ‖ over all tensors together, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in delta.values()))


def clipped(delta: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Δ · min(1, C / ‖Δ‖), float64."""
    size = norm(delta)
    scale = clip / size if size > clip else 1.0
    return {n: t.double() * scale for n, t in delta.items()}


def moved(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each of `after`'s tensors has moved since `before`, float64."""
    return {n: t.double() - before[n].double() for n, t in after.items()}


def noised(after: Mapping[str, Tensor], before: Mapping[str, Tensor], *, clip: float, noise: float, source: Source) -> dict[str, Tensor]:
    """What a client sends instead of `after`: clipped, with its own noise. The clip and z as above."""
    delta = clipped(moved(after, before), clip)
    drawn = {n: source.normal(tuple(t.shape), noise * clip) for n, t in delta.items()}
    return {n: (before[n].double() + t + drawn[n]).to(after[n].dtype) for n, t in delta.items()}


class SumOverCohort:
    """(Σ_k Δ_k) / m, folded one client at a time, where m is the cohort that was planned; float64, the memory of one model.

    Args:
        before: What the clients started from.
        cohort: m.
    """

    def __init__(self, before: Mapping[str, Tensor], cohort: int) -> None:
        self._before, self._cohort, self._total = before, cohort, dict[str, Tensor]()

    def add(self, after: Mapping[str, Tensor]) -> None:
        """Add what one client sent; each must send the same names."""
        self._add(moved(after, self._before))

    def _add(self, delta: Mapping[str, Tensor]) -> None:
        for n, t in delta.items():
            self._total[n] = self._total[n] + t if n in self._total else t

    def mean(self) -> dict[str, Tensor]:
        """The tensors after the round, rounded to the dtype of `before`, float64."""
        return {n: (self._before[n].double() + t / self._cohort).to(self._before[n].dtype).double() for n, t in self._total.items()}


class PrivateMean(SumOverCohort):
    """The private mean of one round: clipped, with noise on the sum.

    Args:
        before: What the clients started from.
        clip: C.
        noise: z.
        cohort: m.
        source: Of the noise.
        tracker: Follows the norms; None keeps C.
    """

    def __init__(
        self, before: Mapping[str, Tensor], *, clip: float, noise: float, cohort: int, source: Source, tracker: Tracker | None = None
    ) -> None:
        super().__init__(before, cohort)
        self._clip, self._source, self._tracker = clip, source, tracker
        self._std = clip * (tracker.left(noise, cohort) if tracker else noise) if noise else 0.0
        self.came = self.under = 0

    def add(self, after: Mapping[str, Tensor]) -> None:
        delta = moved(after, self._before)
        self.came += 1
        self.under += norm(delta) <= self._clip
        self._add(clipped(delta, self._clip))

    def close(self) -> tuple[dict[str, Tensor], float]:
        """The tensors after the round as `mean` gives them, with their noise, and the next round's C."""
        if self._std:
            self._total = {n: t + self._source.normal(tuple(t.shape), self._std) for n, t in self._total.items()}
        out = self.mean()
        if self._tracker is None:
            return out, self._clip
        return out, self._tracker.next(self._clip, self.under, self.came, self._cohort, self._source)

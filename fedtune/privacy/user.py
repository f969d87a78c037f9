"""User-level privacy: limits the influence of all data of one client.

    Δ_k ← Δ_k · min(1, C / ‖Δ_k‖)            ‖·‖ over all tensors sent together
    server:  Δ ← ( Σ_k Δ_k + N(0, (zC)²I) ) / m        m: the planned cohort size, even if fewer came; all clients have equal weight
    client:  Δ_k ← Δ_k + N(0, (zC)²I), before it is sent

At the server the adjacency is zero-out: neighbors differ in one client, whose Δ_k is replaced by zero, with the same m. This changes the
sum by at most C. At the client, where the server sees each Δ_k, the neighbor is a client with any other data: Δ_k changes by up to 2C, so
the accounting uses z / 2.

Adaptive C tracks the γ-quantile of the norms:

    b_k = 1[‖Δ_k‖ ≤ C]      b̃ = ½ + (Σ_k (b_k − ½) + N(0, σ_b²)) / m      C ← C · exp(−η (b̃ − γ))

The round's noise uses the old C. One bit changes its sum by ½; with z_Δ = (z⁻² − (2σ_b)⁻²)^−½ on the tensors, both together cost as much
as z alone.

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
    """Adapts C to a quantile of the updates' norms.

    Args:
        quantile: γ, the share of norms that should be below C.
        rate: η.
        noise: σ_b as a share of the cohort m.
    """

    quantile: float = 0.5
    rate: float = 0.2
    noise: float = 0.05

    def next(self, clip: float, under: int, came: int, cohort: int, source: Source) -> float:
        """C of the next round, if `under` of the `came` clients had a norm of at most `clip`."""
        drawn = float(source.normal((1,), self.noise * cohort))
        share = 0.5 + (under - came / 2 + drawn) / cohort
        return clip * math.exp(-self.rate * (share - self.quantile))

    def tensor_noise(self, noise: float, cohort: int) -> float:
        """z_Δ: the tensors' noise multiplier, so that tensors and bits together cost as much as z alone.

        Raises:
            ConfigError: The bits alone cost more.
        """
        bits = 2 * self.noise * cohort
        if not bits > noise:
            raise ConfigError(
                f"adaptive clipping with a noise multiplier of {noise:.3g} needs more than {bits:.3g} of noise on its bits: raise"
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
    """The change of each of `after`'s tensors since `before`, float64."""
    return {n: t.double() - before[n].double() for n, t in after.items()}


def noised(after: Mapping[str, Tensor], before: Mapping[str, Tensor], *, clip: float, noise: float, source: Source) -> dict[str, Tensor]:
    """The tensors that a client sends instead of `after`: its update clipped to C = `clip`, with noise of multiplier z = `noise`."""
    delta = clipped(moved(after, before), clip)
    drawn = {n: source.normal(tuple(t.shape), noise * clip) for n, t in delta.items()}
    return {n: (before[n].double() + t + drawn[n]).to(after[n].dtype) for n, t in delta.items()}


class SumOverCohort:
    """(Σ_k Δ_k) / m, folded one client at a time in float64, where m is the planned cohort size. Needs the memory of one model.

    Args:
        before: The clients' starting tensors.
        cohort: m.
    """

    def __init__(self, before: Mapping[str, Tensor], cohort: int) -> None:
        self._before, self._cohort, self._total = before, cohort, dict[str, Tensor]()

    def add(self, after: Mapping[str, Tensor]) -> None:
        """Add one client's tensors; all clients must send the same names."""
        self._add(moved(after, self._before))

    def _add(self, delta: Mapping[str, Tensor]) -> None:
        for n, t in delta.items():
            self._total[n] = self._total[n] + t if n in self._total else t

    def mean(self) -> dict[str, Tensor]:
        """The tensors after the round, rounded to the dtype of `before`, float64."""
        return {n: (self._before[n].double() + t / self._cohort).to(self._before[n].dtype).double() for n, t in self._total.items()}


class PrivateMean(SumOverCohort):
    """The private mean of one round: clipped updates, with noise on the sum.

    Args:
        before: The clients' starting tensors.
        clip: C.
        noise: z.
        cohort: m.
        source: Source of the noise.
        tracker: Adapts C to the norms; None keeps C.
    """

    def __init__(
        self, before: Mapping[str, Tensor], *, clip: float, noise: float, cohort: int, source: Source, tracker: Tracker | None = None
    ) -> None:
        super().__init__(before, cohort)
        self._clip, self._source, self._tracker = clip, source, tracker
        self._std = clip * (tracker.tensor_noise(noise, cohort) if tracker else noise) if noise else 0.0
        self.came = self.under = 0

    def add(self, after: Mapping[str, Tensor]) -> None:
        delta = moved(after, self._before)
        self.came += 1
        self.under += norm(delta) <= self._clip
        self._add(clipped(delta, self._clip))

    def close(self) -> tuple[dict[str, Tensor], float]:
        """The tensors after the round, like `mean` but with noise, and the next round's C."""
        if self._std:
            self._total = {n: t + self._source.normal(tuple(t.shape), self._std) for n, t in self._total.items()}
        out = self.mean()
        if self._tracker is None:
            return out, self._clip
        return out, self._tracker.next(self._clip, self.under, self.came, self._cohort, self._source)

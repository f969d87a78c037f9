"""Adam on the server. Uses Flower's class.

Source: Reddi et al. 2021, Adaptive Federated Optimization, arXiv:2003.00295, algorithm 2 (FedAdam); Kingma and Ba 2015, arXiv:1412.6980,
for the bias correction. Algorithm 2 omits it; Flower adds it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flwr.serverapp import strategy as flower
from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.strategy import Requirements, ServerState
from fedtune.strategies import _flower
from fedtune.strategies._mean import MeanStrategy


@dataclass(frozen=True, kw_only=True)
class FedAdam(MeanStrategy):
    """m ← β₁m + (1 − β₁)Δ, v ← β₂v + (1 − β₂)Δ², w ← w + η_t·m / (√v + τ), with Δ = w̄ − w.

    η_t = η·√(1 − β₂ᵗ) / (1 − β₁ᵗ), where t counts the steps since the moments were 0, so that the first step has the full length. (With the
    round number, Flower would use t + 1, and the first step would be 0.74 of Adam's.) For LoRA, the step applies to the factors. A method
    that re-factorizes the adapter must reset the moments, because they refer to the old factors.

    Args:
        lr: Server learning rate η: approximately the step of each parameter per round, independent of the size of the clients' steps.
        beta_1: β₁.
        beta_2: β₂.
        tau: τ: parameters whose mean change is much smaller than τ move in proportion to the change.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    lr: float = 1e-2
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def check(self, config: Config) -> None:
        require("strategy.lr", self.lr, gt=0)
        require("strategy.beta_1", self.beta_1, ge=0, lt=1)
        require("strategy.beta_2", self.beta_2, ge=0, lt=1)
        require("strategy.tau", self.tau, gt=0)

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        by = flower.FedAdam(eta=self.lr, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau)
        return _flower.fed_opt(by, state, mean)

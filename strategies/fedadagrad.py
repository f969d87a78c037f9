"""Adagrad on the server. Uses Flower's class.

Source: Reddi et al. 2021, Adaptive Federated Optimization, arXiv:2003.00295, algorithm 2 (FedAdagrad) with β₁ = 0.
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
class FedAdagrad(MeanStrategy):
    """v ← v + Δ², w ← w + η·Δ / (√v + τ), with Δ = w̄ − w.

    The first step is η for every parameter that changed; later steps shrink as 1 / √t. For LoRA, the step applies to the factors. A method
    that re-factorizes the adapter must reset v, because v refers to the old factors.

    Args:
        lr: Server learning rate η: the step of a parameter in the first round, independent of the size of the clients' steps.
        tau: τ: parameters whose mean change is much smaller than τ move in proportion to the change.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    lr: float = 1e-2
    tau: float = 1e-3

    def check(self, config: Config) -> None:
        require("strategy.lr", self.lr, gt=0)
        require("strategy.tau", self.tau, gt=0)

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        return _flower.fed_opt(flower.FedAdagrad(eta=self.lr, tau=self.tau), state, mean)

"""Federated averaging with server momentum. Uses Flower's class.

For LoRA, the factors A and B have separate momenta, as they have separate means in FedIT.

Source: Hsu, Qi, Brown 2019, Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, arXiv:1909.06335,
section 5: v ← βv + Δ, w ← w − η_s·v, with Δ = w − sum_k p_k w_k.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flwr.serverapp import strategy as flower
from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.strategy import Requirements, ServerState
from fedtune.strategies import _flower
from fedtune.strategies._mean import MeanStrategy, doubles


@dataclass(frozen=True, kw_only=True)
class FedAvgM(MeanStrategy):
    """w ← w − η_s·v with v ← βv + (w − w̄); β = 0, η_s = 1 is FedAvg. Memory: `momentum/<tensor>`, v.

    A method that re-factorizes the adapter (SVD, new A) invalidates v, because v refers to the old factors.

    Args:
        lr: Server learning rate η_s. For a constant Δ, the step per round converges to η_s / (1 − β)·Δ.
        momentum: β.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    lr: float = 1.0
    momentum: float = 0.5

    def check(self, config: Config) -> None:
        require("strategy.lr", self.lr, gt=0)
        require("strategy.momentum", self.momentum, ge=0, lt=1)

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        now = doubles(state.adapter.tensors)
        by = flower.FedAvgM(server_learning_rate=self.lr, server_momentum=self.momentum)
        by.current_arrays = _flower.arrays(now)
        before = _flower.remembered(state.memory, "momentum", now)
        by.momentum_vector = list(before.values()) if before else None
        adapter = _flower.aggregated(by, round, [_flower.reply(mean, 1)], state.adapter)
        after = dict(zip(now, by.momentum_vector or [], strict=False))
        return dataclasses.replace(state, adapter=adapter or state.adapter, memory=_flower.to_remember("momentum", after))

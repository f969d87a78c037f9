"""Coordinate-wise trimmed mean. Uses Flower's class.

Source: Yin et al. 2018, Byzantine-Robust Distributed Learning: Toward Optimal Statistical Rates, arXiv:1803.01498, algorithm 1, option II.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.strategies import _flower
from fedtune.strategies._require import enough_clients


@dataclass(frozen=True, kw_only=True)
class FedTrimmedAvg(Strategy):
    """w ← the coordinate-wise mean of w_k without the ⌊βn⌋ largest and ⌊βn⌋ smallest values; clients have equal weights.

    For LoRA, the mean is over the factors and depends on their gauge: (B G, G⁻¹ A) gives the same ΔW but a different trimmed mean. Holds
    all models of a round in memory.

    Args:
        beta: β, the share trimmed at each end, 0 ≤ β < ½. A round needs 1/β good updates: with fewer, nothing is trimmed.
    """

    requirements: ClassVar[Requirements] = Requirements(averages_entries=True, keeps_basis=True, assumes_zero_init=False)

    beta: float = 0.2

    def check(self, config: Config) -> None:
        require("strategy.beta", self.beta, ge=0, lt=0.5)
        if self.beta:  # with fewer clients nothing is trimmed, and one malicious client controls the mean
            enough_clients(config, "fedtrimmedavg", math.ceil(1 / self.beta), "1/beta")

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        replies = [_flower.reply(u.adapter.tensors, u.examples) for u in _flower.cohort(state, updates)]
        adapter = _flower.aggregated(flower.FedTrimmedAvg(beta=self.beta), round, replies, state.adapter)
        return dataclasses.replace(state, adapter=adapter or state.adapter)

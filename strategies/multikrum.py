"""MultiKrum: the mean of the clients that are closest to the others.

Source: Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, arXiv:1703.02757, section 5.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.strategies import _flower
from fedtune.strategies._gram import distances, krum
from fedtune.strategies._mean import mean_of
from fedtune.strategies._require import enough_clients


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Strategy):
    """w ← Σ p_k w_k over the m clients with the lowest Krum scores, with p_k = n_k / Σ n over these m.

    For LoRA, the selection depends only on s·B·A (see Krum). The factors of the selected clients are then averaged, with the same error as
    in FedAvg. The mean is weighted by examples, as in Flower; the paper's mean is unweighted. Holds all models of a round in memory.

    Args:
        malicious: f, the largest number of malicious clients in a round.
        select: m, the number of clients to average; the guarantee needs n ≥ 2f + 3 and m ≤ n − f − 2.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, assumes_zero_init=False)

    malicious: int = 1
    select: int = 3

    def check(self, config: Config) -> None:
        require("strategy.malicious", self.malicious, ge=0)
        require("strategy.select", self.select, ge=1)
        # report the larger of the two bounds, so that min_clients need not be raised twice
        bounds = {"2·malicious + 3": 2 * self.malicious + 3, "malicious + select + 2": self.malicious + self.select + 2}
        why = max(bounds, key=lambda name: bounds[name])
        enough_clients(config, "multikrum", bounds[why], why)

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        cohort = _flower.cohort(state, updates)
        apart = distances([u.adapter for u in cohort], state.adapter)
        chosen = krum(apart, malicious=self.malicious, select=self.select)
        mean = mean_of((cohort[i] for i in sorted(chosen)), state.adapter.tensors)
        return dataclasses.replace(state, adapter=state.adapter.replace(mean))

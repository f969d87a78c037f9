"""Krum: the new global model is the model of the client that is closest to the others.

Source: Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, arXiv:1703.02757, section 4.
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
from fedtune.strategies._require import enough_clients


@dataclass(frozen=True, kw_only=True)
class Krum(Strategy):
    """w ← w_k of the client k with the lowest sum of squared distances to its n − f − 2 nearest neighbors.

    For LoRA, the distances are between s·B·A per module (heads: between tensors), so that an attacker gains nothing by refactorizing its
    update. Flower's class compares the factors and is therefore not used. Holds all models of a round in memory.

    Args:
        malicious: f, the largest number of malicious clients in a round; the guarantee needs n ≥ 2f + 3.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, assumes_zero_init=False)

    malicious: int = 1

    def check(self, config: Config) -> None:
        require("strategy.malicious", self.malicious, ge=0)
        enough_clients(config, "krum", 2 * self.malicious + 3, "2·malicious + 3")

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        cohort = _flower.cohort(state, updates)
        apart = distances([u.adapter for u in cohort], state.adapter)
        (chosen,) = krum(apart, malicious=self.malicious, select=1)
        return dataclasses.replace(state, adapter=state.adapter.replace(cohort[chosen].adapter.tensors))

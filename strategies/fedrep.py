"""FedRep: as FedPer, but a turn first trains the local tensors alone, then the shared ones alone.

Source: Collins et al. 2021, Exploiting Shared Representations for Personalized Federated Learning, arXiv:2102.07078, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Requirements
from fedtune.strategies.fedper import FedPer


@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """w ← sum_k p_k w_k for the shared tensors. Both phases share the turn's steps and optimizer.

    Args:
        local_share: Share of a turn's steps that train the local tensors, in (0, 1); at least one step each.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, assumes_zero_init=False
    )
    local_share: float = 0.5

    def check(self, config: Config) -> None:
        require("strategy.local_share", self.local_share, gt=0, lt=1)

    def turn(self, plan: Plan) -> Plan:
        return plan.with_turn("fedrep", local_share=self.local_share)

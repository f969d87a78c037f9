"""Federated averaging of adapters that clients train with MeZO's forward passes.

Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes (MeZO), arXiv:2305.17333; McMahan et al. 2017,
arXiv:1602.05629.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._require import no_privacy, sgd_only
from fedtune.strategies.fedavg import FedAvg

_LARGEST = 8.0  # an entry of z is larger with probability 1e-15


@dataclass(frozen=True, kw_only=True)
class FedMeZO(FedAvg):
    """w ← sum_k p_k w_k. A client needs no more memory than for inference, and its step costs two forward passes.

    Args:
        eps: ε of the two-sided difference.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    eps: float = 1e-2

    def check(self, config: Config) -> None:
        require("strategy.eps", self.eps, gt=0)
        sgd_only(config, "fedmezo")
        no_privacy(config, "fedmezo")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return {p.client: Assignment(plan=p.with_turn("mezo", eps=self.eps), adapter=state.adapter, stretch=_LARGEST) for p in plans}

"""APFL: federated averaging, and a personal adapter for each client that it mixes with the shared one.

Source: Deng et al. 2020, Adaptive Personalized Federated Learning, arXiv:2003.13461, algorithm 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._require import no_record_privacy
from fedtune.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class APFL(FedAvg):
    """w ← sum_k p_k w_k, as FedAvg; a client's model is α·v + (1 − α)·w with its own v and α. A turn costs two gradients a step.

    Args:
        alpha: α before a client's first turn.
        alpha_lr: Learning rate of α, once a turn; 0 keeps it.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    alpha: float = 0.5
    alpha_lr: float = 0.1

    def check(self, config: Config) -> None:
        no_record_privacy(config, "apfl")
        require("strategy.alpha", self.alpha, ge=0, le=1)
        require("strategy.alpha_lr", self.alpha_lr, ge=0)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        params = {"alpha": self.alpha, "alpha_lr": self.alpha_lr}
        return {p.client: Assignment(plan=p.with_turn("apfl", **params), adapter=state.adapter) for p in plans}

"""Ditto: federated averaging, and one personal adapter for each client, which stays near the shared one.

Source: Li et al. 2021, Ditto: Fair and Robust Federated Learning Through Personalization, arXiv:2012.04221, algorithm 1.
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
class Ditto(FedAvg):
    """w ← sum_k p_k w_k, as FedAvg; the personal adapters never leave their clients. A turn trains twice.

    Args:
        mu: μ (λ in the paper) of μ/2·‖v − w‖², which holds a client's personal adapter v near the shared w. 0: v is trained on the client's
            rows alone.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    mu: float = 0.1

    def check(self, config: Config) -> None:
        no_record_privacy(config, "ditto")
        require("strategy.mu", self.mu, ge=0)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return {p.client: Assignment(plan=p.with_turn("ditto", mu=self.mu), adapter=state.adapter) for p in plans}

"""RAVAN: the mean of the heads' scaled cores, which is the exact mean of the clients' updates.

All clients share the frozen bases, so Σ_k p_k Σ_i s_ki·B_i·H_ki·A_i = Σ_i B_i (Σ_k p_k s_ki·H_ki) A_i. Means of s and H apart would not
give it. Clients send s_i·H_i and start every turn with s_i = 1, so neither scales nor bases are ever sent.

Source: Raje et al. 2025, RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025, arXiv:2506.05568. In the paper, a
weak client may train some of the heads; here every client trains all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.errors import ConfigError
from fedtune.strategies.fedavg import FedAvg

SENT = ("*", "!*.core_scale")


@dataclass(frozen=True, kw_only=True)
class RAVAN(FedAvg):
    """H_i ← Σ_k p_k s_ki·H_ki with p_k = n_k / Σ n, and s_i = 1; heads of a classifier: weighted mean."""

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method has no scaled cores."""
        if config.peft.method != "ravan":
            raise ConfigError(f"strategy=ravan averages scaled cores, which peft.method={config.peft.method} does not have: set peft=ravan")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        sent = state.adapter.subset(matching(state.adapter.tensors, SENT))
        turns = [dataclasses.replace(p.with_turn("ravan"), send=SENT) for p in plans]
        return {p.client: Assignment(plan=p, adapter=sent, recombines=True) for p in turns}

"""FFA-LoRA: freeze A and train B, so that averaging is exact.

With one common A, sum_k p_k B_k A = (sum_k p_k B_k) A: averaging factors has no error, clients send half the bytes, and privacy noise is
in one factor of the product instead of both. Server and clients draw A from the run's seed, so it is never sent.

Source: Sun et al. 2024, Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv:2403.12313.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._lowrank import require_product
from fedtune.strategies.fedavg import FedAvg

ALL_BUT_A = ("*", "!*.lora_A")


@dataclass(frozen=True, kw_only=True)
class FFA(FedAvg):
    """B ← sum_k p_k B_k with p_k = n_k / sum n, and the same for heads; A keeps its initial value."""

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method is not plain LoRA."""
        require_product(config, "ffa", why="one common A makes the mean of B exact for plain LoRA only")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        sent = state.adapter.subset(matching(state.adapter.tensors, ALL_BUT_A))
        return {p.client: Assignment(plan=dataclasses.replace(p, train=ALL_BUT_A, send=ALL_BUT_A), adapter=sent) for p in plans}

"""FedSA-LoRA: share A (common knowledge); B (client-specific knowledge) stays on each client.

Every client ends with a personal adapter: the common Ā with its own B and head. The server holds Ā, the initial B = 0 and the initial head.
Its product is zero, so a global evaluation measures the unmodified backbone: use the clients' own metrics. A client that never
participated has the common Ā and B = 0.

Source: Guo et al. 2025, Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025, arXiv:2410.01463.
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

SHARED, OWN = ("*.lora_A",), ("*", "!*.lora_A")


@dataclass(frozen=True, kw_only=True)
class FedSA(FedAvg):
    """A ← sum_k p_k A_k with p_k = n_k / sum n; clients train A, B and head, and keep B and head between turns."""

    # no accepts_stale: a client's B changes before its late A arrives; assumes_zero_init: the server keeps the initial B while A changes
    requirements: ClassVar[Requirements] = Requirements(averages_entries=True, keeps_basis=True, needs_only_mean=True)

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method is not plain LoRA."""
        require_product(config, "fedsa", why="clients share LoRA's A and keep its B")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        sent = state.adapter.subset(matching(state.adapter.tensors, SHARED))
        return {p.client: Assignment(plan=dataclasses.replace(p, send=SHARED, keep=OWN), adapter=sent) for p in plans}

"""FedRot-LoRA: federated averaging of factors that the clients have rotated toward the common ones.

The product B·A does not determine its factors: (B·Q, Qᵀ·A) has the same product for every orthogonal Q. Clients drift to different Q, and a
mean of their factors then loses a part of each product. `clients/turns/fedrot.py` aligns them; the server computes FedAvg's mean, with a
smaller error Σ p_k B_k A_k − B̄·Ā. Odd rounds align A, even rounds B.

Source: Zhang et al. 2026, FedRot-LoRA, ICML 2026, arXiv:2602.23638; the turn's file lists the deviations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._lowrank import require_product
from fedtune.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedRot(FedAvg):
    """A ← Σ p_k Q_kᵀA_k, B ← Σ p_k B_kQ_k with p_k = n_k / Σ n; magnitudes and heads: weighted mean. Its bytes are FedAvg's.

    Args:
        share: λ, how far a client rotates its factors toward the received ones; 0 is FedAvg.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False)
    share: float = 0.5

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method has no LoRA factors."""
        require("strategy.share", self.share, ge=0, le=1)
        require_product(config, "fedrot", exactly=False, why="it rotates LoRA's factors")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        turns = [p.with_turn("fedrot", share=self.share, factor="lora_A" if round % 2 else "lora_B") for p in plans]
        return {p.client: Assignment(plan=p, adapter=state.adapter, recombines=True) for p in turns}

"""FedSVD: train only B, and re-factorize the product with an SVD each round.

    clients train and send B; A is frozen and common, so that B̄ A is the exact mean;
    server: B̄ A = U S Vᵀ,  A ← V_rᵀ,  B ← U_r S_r    (no truncation: the rank is at most r; skipped while B̄ = 0)

The noise of differentially private training is in one factor, not in a product of two, and A's orthonormal rows do not amplify it. With
DoRA, the magnitudes are also trained and averaged; the re-factorization leaves the direction's product unchanged.

Source: Lee et al. 2025, FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, arXiv:2505.12805.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.config import Config
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._lowrank import require_product, stack, truncate, with_factors
from fedtune.strategies._mean import MeanStrategy

TRAINED = ("*", "!*.lora_A")


@dataclass(frozen=True, kw_only=True)
class FedSVD(MeanStrategy):
    """B_k (out, r)  →  B̄ (out, r), then both factors from the SVD of B̄ A; heads: weighted mean.

    The server sends A each round, because it changes each round; clients never send it.
    """

    requirements: ClassVar[Requirements] = Requirements(needs_only_mean=True, assumes_zero_init=False)

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method has no LoRA factors."""
        require_product(config, "fedsvd", exactly=False, why="it decomposes the product of LoRA's factors")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return {p.client: Assignment(plan=dataclasses.replace(p, train=TRAINED, send=TRAINED), adapter=state.adapter) for p in plans}

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        adapter = state.adapter
        means = {n: mean[n].to(adapter[n].dtype) for n in matching(mean, TRAINED)}
        products = {m: (1.0, adapter[f"{m}.lora_A"], means[f"{m}.lora_B"]) for m in adapter.spec.ranks}
        new = {m: truncate(stack([term]), adapter.spec.ranks[m]) for m, term in products.items() if term[2].any()}
        return dataclasses.replace(state, adapter=with_factors(adapter, new, means))

"""LoRA with mixed ranks, using the singular value decomposition of the averaged update.

    D ← D + Σ_k p_k (s_k B_k A_k − P_{r_k}(D)) = U S Vᵀ;    client k gets P_{r_k}(D): A = V_{r_k}ᵀ and B = U_{r_k} S_{r_k} / s_k

P_r keeps the first r components, so each client's change is relative to the adapter it received. The sum is exact and is then truncated
to the config's rank r. A client gets the best approximation of D of its rank; the error is √(Σ_{i > r_k} σ_i²) in the Frobenius norm. With
DoRA, D is the sum of the directions' updates, and the magnitudes are averaged.

The paper sums products, D ← Σ_k p_k s_k B_k A_k, which is the same for equal ranks. For mixed ranks, it counts components that a
lower-rank client never received as zeros: even without training, component i decays each round by the weight of the clients with r_k < i
(rank collapse, Wu et al. 2026, arXiv:2602.13486).

Source: Bai et al. 2024, Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources (FlexLoRA),
arXiv:2402.11505. The paper forms D as a dense matrix; here it stays factored. The sum of changes is our modification.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.strategies._lowrank import Cohort, Pair, assign, require_product, stack, truncate, with_factors


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(Strategy):
    """A_k (r_k, in), B_k (out, r_k)  →  A (r, in), B (out, r) of the config's rank, by descending σ; heads: weighted mean."""

    requirements: ClassVar[Requirements] = Requirements(mixes_ranks=True, assumes_zero_init=False)

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method has no LoRA factors."""
        require_product(config, "flexlora", exactly=False, why="it decomposes the product of LoRA's factors")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return assign(plans, state.adapter)

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        adapter, cohort = state.adapter, Cohort.of(updates)
        new = {m: _decompose(cohort, adapter, m) for m in adapter.spec.ranks}
        return ServerState(adapter=with_factors(adapter, new, cohort.mean(adapter.tensors)), memory=state.memory, shifts=state.shifts)


def _decompose(cohort: Cohort, adapter: AdapterState, module: str) -> Pair:
    """A = V_rᵀ, B = U_r S_r / s of one module."""
    # The current A with B = 0 adds only directions with σ = 0. Without them, if D's rank is below r (a cohort of small devices), some rows
    # of A and columns of B would both be 0, and so would both gradients.
    idle = (1.0, adapter[f"{module}.lora_A"], torch.zeros_like(adapter[f"{module}.lora_B"]))
    a, b = truncate(stack([*cohort.terms(module), *cohort.missed(adapter, module), idle]), adapter.spec.ranks[module])
    return a, b / adapter.spec.scaling[module]

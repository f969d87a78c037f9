"""LoRA-FAIR: average the factors, and correct B for the error of this average.

    Ā = Σ p_k A_k,  B̄ = Σ p_k B_k,  E = Σ p_k s_k B_k A_k / s − B̄ Ā,  B = B̄ + ΔB
    ΔB = argmin ‖E − ΔB Ā‖² + λ‖ΔB‖² = E Āᵀ (Ā Āᵀ + λI)⁻¹

The part of E outside the row space of Ā is lost. The server sends only the adapter, as in FedAvg. With DoRA, B·A changes the direction.

Source: Bian et al. 2024, LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, arXiv:2411.14961. The paper
finds ΔB by gradient steps on a similarity measure with the same penalty; the squared error used here has the closed form above.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.strategies._lowrank import Cohort, Pair, require_product, stack


@dataclass(frozen=True, kw_only=True)
class LoRAFair(Strategy):
    """A_k (r, in), B_k (out, r)  →  Ā, B̄ + ΔB; heads: weighted mean.

    Args:
        ridge: λ, in the units of Ā Āᵀ (about 1/3 on its diagonal for LoRA's initial A): a larger λ keeps B closer to B̄.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, assumes_zero_init=False)

    ridge: float = 0.01

    def check(self, config: Config) -> None:
        """Raises ConfigError if λ is not positive or the method has no LoRA factors."""
        if not self.ridge > 0:
            raise ConfigError(f"strategy.ridge={self.ridge} must be greater than 0: Ā Āᵀ alone may be singular")
        require_product(config, "lora_fair", exactly=False, why="it corrects the product of LoRA's factors")

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        cohort = Cohort.of(updates, average=("*",))
        adapter = state.adapter.replace(cohort.mean(state.adapter.tensors))
        corrected = dict(adapter.tensors)
        for module, s in adapter.spec.scaling.items():
            a, b = adapter[f"{module}.lora_A"].double(), adapter[f"{module}.lora_B"]
            error = stack([*((w / s, a_k, b_k) for w, a_k, b_k in cohort.terms(module)), (-1.0, a, b)])
            corrected[f"{module}.lora_B"] = (b.double() + correction(error, a, self.ridge)).to(b.dtype)
        return ServerState(adapter=adapter.replace(corrected), memory=state.memory, shifts=state.shifts)


def correction(error: Pair, a: Tensor, ridge: float) -> Tensor:
    """ΔB (out, r) = E aᵀ (a aᵀ + λI)⁻¹ for E = error_b @ error_a and a (r, in), without forming E."""
    error_a, error_b = error
    gram = a @ a.T + ridge * torch.eye(len(a), dtype=a.dtype)
    return torch.linalg.solve(gram, (error_b @ (error_a @ a.T)).T).T  # the Gram matrix is symmetric

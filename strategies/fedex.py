"""Exact LoRA aggregation with a residual: average the factors, and merge the error of this average into the frozen weights.

    Ā = Σ p_k A_k,  B̄ = Σ p_k B_k,  W += Σ p_k s_k B_k A_k − s·B̄ Ā

Source: Singhal et al. 2024, FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models, arXiv:2410.09432.
The paper sends the residual as one dense matrix per layer; here it is sent as factors of its true rank, at most (K − 1)·r for equal s_k.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.strategies._lowrank import Cohort, compact, require_product, shift


@dataclass(frozen=True, kw_only=True)
class FedEx(Strategy):
    """A_k (r, in), B_k (out, r)  →  the adapter Ā, B̄ and a shift by the residual; heads: weighted mean."""

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, assumes_zero_init=False, beyond_adapter=True)

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method is not plain LoRA."""
        require_product(
            config,
            "fedex",
            why="it merges the error of s·B·A into the frozen weights, which gives the clients' mean for plain LoRA only",
        )

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        cohort = Cohort.of(updates, average=("*",))
        adapter = state.adapter.replace(cohort.mean(state.adapter.tensors))
        # computed from the means after the dtype cast, so that the residual also corrects the cast's rounding
        residual = {
            m: compact([*cohort.terms(m), (-s, adapter[f"{m}.lora_A"], adapter[f"{m}.lora_B"])]) for m, s in adapter.spec.scaling.items()
        }
        return ServerState(
            adapter=adapter,
            memory=state.memory,
            shifts=(*state.shifts, *shift(residual, base=adapter.spec.base, round=round)),
        )

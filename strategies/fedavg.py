"""Federated averaging of the adapter's tensors.

For LoRA this is FedIT: A and B are averaged separately, so the product is off by sum_k p_k (B_k - B̄)(A_k - Ā).

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv:1602.05629, algorithm 1;
Zhang et al. 2023, Toward Building the Federated GPT (FedIT), arXiv:2305.05644.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.contracts.strategy import Requirements, ServerState
from fedtune.strategies._mean import MeanStrategy


@dataclass(frozen=True, kw_only=True)
class FedAvg(MeanStrategy):
    """w ← sum_k p_k w_k with p_k = n_k / sum n, for each tensor that clients send. Takes the memory of one model in float64."""

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        old = state.adapter.tensors
        return dataclasses.replace(state, adapter=state.adapter.replace({**old, **{n: t.to(old[n].dtype) for n, t in mean.items()}}))

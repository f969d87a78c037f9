"""Federated averaging of the adapter's tensors.

For LoRA this is FedIT: A and B are averaged apart, so the product is off by sum_k p_k (B_k - B̄)(A_k - Ā).

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv:1602.05629, algorithm 1;
Zhang et al. 2023, Towards Building the Federated GPT (FedIT), arXiv:2305.05644.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedtune.plan import Update
from fedtune.strategies._mean import Mean
from fedtune.strategy import ServerState, Strategy


@dataclass(frozen=True, kw_only=True)
class FedAvg(Strategy):
    """w ← sum_k p_k w_k with p_k = n_k / sum n, tensor by tensor; what nobody sends stays. The memory of one model in float64."""

    takes_mean: ClassVar[bool] = True
    takes_late: ClassVar[bool] = True

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        mean = Mean()
        for update in updates:
            mean.add(update.adapter.tensors, update.examples)
        old = state.adapter.tensors
        return dataclasses.replace(state, adapter=state.adapter.replace({**old, **mean.of(old)}))

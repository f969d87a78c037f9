"""Federated averaging of the adapter's tensors.

For LoRA this is FedIT: A and B are averaged apart, so the product is off by sum_k p_k (B_k - B̄)(A_k - Ā).

Source: McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, arXiv:1602.05629, algorithm 1;
Zhang et al. 2023, Towards Building the Federated GPT (FedIT), arXiv:2305.05644.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedtune.plan import Plan, Update
from fedtune.state import AdapterState
from fedtune.strategy import Assignment, ServerState


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """w ← sum_k p_k w_k with p_k = n_k / sum n, tensor by tensor; the memory of one model in float64."""

    def start(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter=adapter)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return {plan.client: Assignment(plan=plan, adapter=state.adapter) for plan in plans}

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        # float64: n_k * w_k of a float32 w_k is exact, so that one client alone comes back bit for bit
        total, examples = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in state.adapter.tensors.items()}, 0
        for update in updates:
            examples += update.examples
            for name, tensor in update.adapter.tensors.items():
                total[name].add_(tensor.double(), alpha=update.examples)
        mean = {n: (t / examples).to(state.adapter[n].dtype) for n, t in total.items()}
        return ServerState(adapter=state.adapter.replace(mean))

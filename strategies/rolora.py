"""RoLoRA: train B and A in alternating rounds, so that averaging is exact in every round and both are trained.

Odd rounds train B with a common A, even rounds A with a common B. B is first: it starts at zero, and with B = 0 the gradient of A is zero.
Failed rounds do not count: the next round trains the same factor again. Clients send one factor. The server sends the whole adapter,
because a client that missed the last round lacks the factor trained in it. The local optimizer is reset each round; the paper requires a
reset at each change of factors.

Source: Chen et al. 2025, Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS 2025, arXiv:2502.01755.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._lowrank import require_product
from fedtune.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class RoLoRA(FedAvg):
    """Round t odd: B ← sum_k p_k B_k; t even: A ← sum_k p_k A_k; p_k = n_k / sum n; heads are trained and averaged in every round.

    Memory: `turns`, the number of successful rounds.
    """

    # no accepts_stale: an update one round late contains the other factor
    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, assumes_zero_init=False
    )

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method is not plain LoRA."""
        require_product(config, "rolora", why="training one factor at a time makes its mean exact for plain LoRA only")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        moving = ("*", "!*.lora_B") if _turns(state) % 2 else ("*", "!*.lora_A")
        return {p.client: Assignment(plan=dataclasses.replace(p, train=moving, send=moving), adapter=state.adapter) for p in plans}

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        after = super().aggregate_mean(round, state, mean)
        return dataclasses.replace(after, memory={"turns": torch.tensor(_turns(state) + 1)})


def _turns(state: ServerState) -> int:
    return int(state.memory.get("turns", 0))

"""HetLoRA's self-pruning: a client drops ranks that became less important in its turn.

Source: Cho et al. 2024, Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, arXiv:2401.06432, §4.1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import BatchedTurn, Stack, Turn, Work
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import PlanError


class BatchedTailPenalty(BatchedTurn):
    """The penalties of all clients, each with its own λ, rank and tail."""

    def __init__(self, turns: Sequence["HetLoRA"], stack: Stack) -> None:
        self._turns = turns

    def step(self, stack: Stack) -> None:
        device, total = next(iter(stack.views.values())).device, torch.zeros(())
        turns, starts = [self._turns[i] for i in stack.rows], [stack.starts[i] for i in stack.rows]
        weight = torch.tensor([t.penalty for t in turns], device=device)
        for module in starts[0].spec.ranks:
            a, b = stack.views[f"{module}.lora_A"], stack.views[f"{module}.lora_B"]
            first = torch.tensor([math.floor(t.share * s.spec.ranks[module]) for t, s in zip(turns, starts, strict=True)], device=device)
            tail = (torch.arange(a.shape[1], device=device) >= first[:, None]).to(a.dtype)  # (C, r); zero beyond a client's rank
            norms = torch.linalg.vector_norm(b * tail[:, None], dim=(1, 2)) * torch.linalg.vector_norm(a * tail[:, :, None], dim=(1, 2))
            total = total.to(device) + (weight * norms).sum()
        total.backward()


@dataclass(frozen=True, kw_only=True)
class HetLoRA(Turn):
    """Adds λ·‖B[:, ⌊γr⌋:]‖·‖A[⌊γr⌋:]‖ of every LoRA module to the loss; prunes a module to rank ⌊γr⌋ if the turn reduced this product.

    Args:
        penalty: λ.
        share: γ, in (0, 1).
    """

    private: ClassVar[tuple[str, ...]] = ("record", "user")
    batched: ClassVar[type[BatchedTurn] | None] = BatchedTailPenalty
    penalty: float
    share: float

    def check(self) -> None:
        require("the turn's penalty", self.penalty, PlanError, ge=0)
        require("the turn's share", self.share, PlanError, gt=0, lt=1)

    def step(self, work: Work, memory: None) -> None:
        (self.penalty * tail_norms(work.live.parameters, work.start.spec.ranks, self.share)).backward()

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        return prune(work.start, trained, self.share)


def tail_norms(tensors: Mapping[str, Tensor], ranks: Mapping[str, int], share: float) -> Tensor:
    """Σ over modules of ‖B[:, m:r]‖·‖A[m:r]‖ with m = ⌊share·r⌋ (eq. 4)."""
    total = torch.zeros(())
    for module, rank in ranks.items():
        a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        tail = slice(math.floor(share * rank), rank)
        total = total.to(a.device) + torch.linalg.norm(b[:, tail]) * torch.linalg.norm(a[tail])
    return total


def prune(start: AdapterState, trained: AdapterState, share: float) -> AdapterState:
    """Truncate each LoRA module to rank m = ⌊share·r⌋ (at least 1) if ‖B[:, m:]‖·‖A[m:]‖ is smaller than before the turn."""
    tensors, ranks = dict(trained.tensors), dict(trained.spec.ranks)
    for module, rank in trained.spec.ranks.items():
        a, b, kept = f"{module}.lora_A", f"{module}.lora_B", max(1, math.floor(share * rank))

        def tail(state: AdapterState, a: str = a, b: str = b, kept: int = kept) -> float:
            return float(torch.linalg.norm(state[b][:, kept:]) * torch.linalg.norm(state[a][kept:]))

        if kept < rank and tail(trained) < tail(start):
            tensors[a], tensors[b], ranks[module] = trained[a][:kept].contiguous(), trained[b][:, :kept].contiguous(), kept
    return trained.replace(tensors, ranks=ranks)

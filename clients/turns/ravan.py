"""RAVAN's client half: a client sends s_i·H_i of each head, as one core with s_i = 1.

Source: Raje et al. 2025, RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning, NeurIPS 2025, arXiv:2506.05568.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.clients.turns._base import BatchedTurn, Turn, Work
from fedtune.contracts.adapter_state import AdapterState

SCALE = ".core_scale"


@dataclass(frozen=True, kw_only=True)
class RAVAN(Turn):
    """H_i ← s_i·H_i and s_i ← 1, after plain training of both."""

    private: ClassVar[tuple[str, ...]] = ("record", "user")
    batched: ClassVar[type[BatchedTurn] | None] = BatchedTurn

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        scales = {n.removesuffix(SCALE): t for n, t in trained.tensors.items() if n.endswith(SCALE)}
        cores = {f"{m}.core": scale[:, None, None] * trained[f"{m}.core"] for m, scale in scales.items()}
        return trained.replace({**trained.tensors, **cores, **{m + SCALE: torch.ones_like(t) for m, t in scales.items()}})

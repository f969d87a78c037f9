"""FedRot-LoRA's alignment: a client rotates its factors toward those that it received, which leaves their product unchanged.

(B·Q, Qᵀ·A) has the product B·A for every orthogonal Q. The best Q for one factor follows from an SVD (orthogonal Procrustes problem):

    min ‖Qᵀ·A − A_ref‖ :  N = A·A_refᵀ        min ‖B·Q − B_ref‖ :  N = Bᵀ·B_ref        N = U·Σ·Vᵀ,  Q* = U·Vᵀ

The client applies the orthogonal matrix nearest to (1 − λ)·I + λ·Q*.

Source: Zhang et al. 2026, FedRot-LoRA, ICML 2026, arXiv:2602.23638. Unlike the public code, Q* may be a reflection: with det Q = 1 forced,
factors that differ by signs cannot be aligned. For λ = 1/2 and a half turn, (I + Q*)/2 is singular; the client then turns all the way.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import BatchedTurn, Turn, Work
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import PlanError

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class FedRot(Turn):
    """Rotates A and B of each LoRA module whose received B is not 0; before that, all clients have one A, and there is nothing to align.

    It runs before a private turn clips and adds noise, so that the clipped difference is that of aligned factors.

    Args:
        share: λ, from 0 (no rotation) to 1 (the best one).
        factor: The factor to bring near the received one: lora_A or lora_B.
    """

    private: ClassVar[tuple[str, ...]] = ("record", "user")
    batched: ClassVar[type[BatchedTurn] | None] = BatchedTurn
    share: float
    factor: str

    def check(self) -> None:
        require("the turn's share", self.share, PlanError, ge=0, le=1)
        require("the turn's factor", self.factor, PlanError, choices=FACTORS)

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        tensors, start = dict(trained.tensors), work.start
        for module in trained.spec.ranks if self.share else ():
            a, b = (f"{module}.{factor}" for factor in FACTORS)
            if start[b].any():
                old_a, old_b = trained[a].double(), trained[b].double()
                n = old_a @ start[a].double().T if self.factor == "lora_A" else old_b.T @ start[b].double()
                q = rotation(n, self.share)
                tensors |= {a: (q.T @ old_a).to(trained[a].dtype), b: (old_b @ q).to(trained[b].dtype)}
        return trained.replace(tensors)


def rotation(n: Tensor, share: float) -> Tensor:
    """The orthogonal matrix nearest to (1 − λ)·I + λ·Q*, for N (r, r) in float64."""
    one = torch.eye(len(n), dtype=n.dtype)
    best = _orthogonal(n + 1e-9 * n.norm() * one)  # directions that N lacks stay as they are
    share = 0.5 + 1e-6 if share == 0.5 else share  # see the singular case above
    return _orthogonal((1 - share) * one + share * best)


def _orthogonal(x: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(x)
    return u @ vt

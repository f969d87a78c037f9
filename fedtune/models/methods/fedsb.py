"""Fed-SB: one trained core between two frozen orthonormal bases; the mean of the clients' cores is the exact mean of their updates.

    W = W0 + B·R·A        A (r, in) and B (out, r) frozen, R (r, r) = 0 at the start and trained

A client sends r² numbers for each layer, whatever the layer's size. The paper (LoRA-SB) takes A, B and R from the SVD of an estimate of the
first full fine-tuning step; here the bases are random, and R is zero.

Source: Singhal et al. 2025, Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning, arXiv:2502.15436.
"""

from typing import TYPE_CHECKING

from fedtune.config import PeftConfig, TaskConfig
from fedtune.models.methods import Attached
from fedtune.models.methods.ravan import attach_cores, edits, initial, is_noop, targeted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "edits", "initial", "is_noop", "targeted"]


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """`<module>.core` (1, r, r) at peft.targets, with r = peft.core."""
    return attach_cores(model, peft, task, 1, scaled=False)

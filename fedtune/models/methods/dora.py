"""DoRA: LoRA for the direction of each row of W, and a learned magnitude for its length.

W = m · (W0 + s·B·A) / ‖W0 + s·B·A‖, m and the norm a number a row of W. The state holds m − ‖W0‖.

Source: Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
"""

from typing import TYPE_CHECKING

from fedtune.config import PeftConfig, TaskConfig
from fedtune.models.methods import Attached
from fedtune.models.methods.lora import attach_factors, edits, idle, initial, targeted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "edits", "idle", "initial", "targeted"]


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """As LoRA, with a magnitude a row, which starts as the norm of the backbone's own."""
    return attach_factors(model, peft, task, magnitudes=True)

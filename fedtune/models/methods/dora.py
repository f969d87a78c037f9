"""DoRA: LoRA for the direction of each row of W, and a learned magnitude for its norm.

W = m · (W0 + s·B·A) / ‖W0 + s·B·A‖, with one m and one norm per row of W. The state contains m − ‖W0‖.

Source: Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
"""

from typing import TYPE_CHECKING

from fedtune.config import PeftConfig, TaskConfig
from fedtune.models.methods import Attached
from fedtune.models.methods.lora import attach_factors, edits, initial, is_noop, targeted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "edits", "is_noop", "initial", "targeted"]

product = "part"


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """LoRA with a magnitude for each row, initialized to the norm of the backbone's row."""
    return attach_factors(model, peft, task, magnitudes=True)

"""Rank-stabilized LoRA: the update keeps its size as the rank grows, s = alpha / √r.

Source: Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732.
"""

from typing import TYPE_CHECKING

from fedtune.config import PeftConfig, TaskConfig
from fedtune.models.methods import Attached
from fedtune.models.methods.lora import attach_factors, edits, factors, idle, initial, targeted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "edits", "factors", "idle", "initial", "targeted"]

inits = ("default", "loftq")


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """As LoRA, with the other scaling."""
    return attach_factors(model, peft, task, stabilized=True)

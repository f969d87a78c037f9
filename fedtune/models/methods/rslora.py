"""Rank-stabilized LoRA: s = alpha / √r, so that the size of the update does not depend on the rank.

Source: Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732.
"""

from typing import TYPE_CHECKING

from fedtune.config import PeftConfig, TaskConfig
from fedtune.models.methods import Attached
from fedtune.models.methods.lora import attach_factors, edits, factors, initial, is_noop, targeted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "edits", "factors", "is_noop", "initial", "targeted"]

inits = ("default", "loftq")
experts = True
product = "whole"
rank_power = 0.5


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """LoRA with the scaling alpha / √r."""
    return attach_factors(model, peft, task, stabilized=True)

"""A classifier's head: trained in float32 by every method."""

from torch import nn
from transformers import PreTrainedModel

from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.models.backbone import head_names


def trained_heads(model: nn.Module, task: TaskConfig) -> list[str]:
    """Top-level modules of the original model that are fully trained: a classifier's head, such as `score`; none for other tasks."""
    return head_names(model) if task_of(task).head else []


def train_head(model: PreTrainedModel, task: TaskConfig) -> dict[str, nn.Parameter]:
    """Make the head trainable in place, for a method without PEFT's wrapper.

    Returns:
        Name in the model, such as `score.weight` → parameter.
    """
    out = {}
    for head in trained_heads(model, task):
        for name, parameter in model.get_submodule(head).named_parameters():
            parameter.data = parameter.data.float()
            out[f"{head}.{name}"] = parameter.requires_grad_(True)
    return out

"""The loss of a batch and its logits, with the task's targets and loss function."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedtune.config import TaskConfig
from fedtune.contracts.task import Task, task_of
from fedtune.models.lean import step_of

_PIECE = 1 << 22  # logits to convert to float32 at once in training


def loss_sum(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, int]:
    """The summed loss and the number of its terms, so that accumulation over unequal micro-batches is exact.

    Args:
        model: A model whose output has `logits`.
        batch: A batch from `collate`.
        task: The task, which defines the loss.

    Returns:
        The loss (summed), and the number of its terms (targets, or pairs).
    """
    kind = task_of(task)
    if (step := step_of(model)) is not None:
        if (losses := step.token_losses(batch, task)) is not None:
            losses = kind.reduce(losses, batch)
            return losses.sum(), len(losses)
        with step.installed(batch):
            logits, targets = _counted(model, batch, task)
    else:
        logits, targets = _counted(model, batch, task)
    if kind.sequences > 1:
        losses = kind.reduce(_losses(kind, logits, targets, "none"), batch)
        return losses.sum(), len(losses)
    return _losses(kind, logits, targets, "sum").sum(), len(targets)


def _losses(kind: Task, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The loss of each position, (N,), or with "sum" of each piece of them."""
    if logits.dtype == torch.float32:
        return kind.loss(logits, targets, reduction)
    # for 16-bit logits, the float32 copy and its log-softmax would dominate a step's memory, so they are computed in pieces
    rows = max(1, _PIECE // logits.shape[-1])

    def piece(some: Tensor, wanted: Tensor) -> Tensor:
        return kind.loss(some.float(), wanted, reduction)

    pieces = zip(logits.split(rows), targets.split(rows), strict=True)
    losses = [checkpoint(piece, some, wanted, use_reentrant=False, preserve_rng_state=False) for some, wanted in pieces]
    return torch.stack(losses) if reduction == "sum" else torch.cat(losses)


def counted_logits(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, Tensor]:
    """float32 logits (N, …) and targets (N, …) of all positions with a target, row by row."""
    logits, targets = _counted(model, batch, task)
    return logits.float(), targets


def training_logits(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, Tensor]:
    """`counted_logits`, with the layers of the lean step if the model has one."""
    step = step_of(model)
    with contextlib.nullcontext() if step is None else step.installed(batch):
        return counted_logits(model, batch, task)


def _counted(model: nn.Module, batch: Mapping[str, Tensor], task: TaskConfig) -> tuple[Tensor, Tensor]:
    """`counted_logits` in the model's output dtype."""
    kind = task_of(task)
    counts, inputs = kind.counts(batch), kind.inputs(model, batch)

    def call(**more: Any) -> Any:
        return model(**inputs, **more)

    return kind.logits(model, call, counts.shape[1], lambda hidden: hidden[counts]), kind.targets(batch)[counts]

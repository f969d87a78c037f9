"""The memory of a micro-batch, measured in a forward pass: the storages that autograd saves for the backward pass, each counted once.

The process's memory cannot be used for a simulated device, because it also contains other clients, other precisions and Python itself.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.models import LiveAdapter, loss_sum
from fedtune.models.sparse import SparseSlot

Slot = LiveAdapter | SparseSlot


def stored_bytes(model: nn.Module, without: Iterable[Tensor]) -> int:
    """Bytes of all parameters and buffers except `without`, including the scales and tables of quantized weights."""
    seen, total = {t.untyped_storage().data_ptr() for t in without}, 0
    for tensor in (t for p in (*model.parameters(), *model.buffers()) for t in _parts(p)):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += tensor.numel() * tensor.element_size()  # not storage.nbytes(): a memory-mapped file is one storage
    return total


def _parts(tensor: Tensor) -> list[Tensor]:
    state = getattr(tensor, "quant_state", None)
    nested = getattr(state, "state2", None)
    found = [getattr(s, n, None) for s in (state, nested) if s is not None for n in ("absmax", "code")]
    found.append(getattr(tensor, "SCB", None))
    return [tensor, *(t for t in found if isinstance(t, Tensor))]


def kept_bytes(slot: Slot, task: TaskConfig, names: Iterable[str], rows: int, width: int, counted: int) -> int:
    """Bytes that a micro-batch saves for its backward pass; the largest tensor counts twice, to include its gradient.

    The model's parameters do not count. The model and torch's generators are left unchanged.

    Args:
        slot: The model.
        task: The task, which defines the loss.
        names: The trained tensors.
        rows: Rows of the micro-batch.
        width: Tokens of each row.
        counted: Target tokens per row; they are its last tokens.
    """
    model, trained, device = slot.model, set(names), slot.backbone.device
    batch = _batch(slot, task, rows, width, counted, device)
    flags = {p: p.requires_grad for p in slot.parameters.values()}
    own = {t.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers()) for t in _parts(p)}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # keeps storages alive, because a freed address could be reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    training = model.training, slot.backbone.model.training
    try:
        for name, p in slot.parameters.items():
            p.requires_grad_(name in trained)
        model.train()
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss_sum(model, batch, task)
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        if not all(training):
            model.train(training[0])
            slot.backbone.model.train(training[1])
    return sum(sizes.values()) + max((t.nbytes for t in held), default=0)


def _batch(slot: Slot, task: TaskConfig, rows: int, width: int, counted: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.full((rows, width), 3, device=device)
    mask = torch.ones_like(ids)
    if slot.backbone.seq2seq:  # the decoder gets the answer as a separate row
        answer = torch.full((rows, counted + 1), 3, device=device)
        return {"input_ids": ids, "attention_mask": mask, "labels": task_of(task).example_labels(answer, torch.ones_like(answer))}
    last = torch.arange(width, device=device).expand(rows, width) >= width - counted
    return {"input_ids": ids, "attention_mask": mask, "labels": task_of(task).example_labels(ids, last)}

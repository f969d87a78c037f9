"""Merges a complete model in memory, for the few that cannot be read tensor by tensor, and splits the head off an adapter."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedtune.config import TaskConfig
from fedtune.errors import ModelError
from fedtune.export.requantize import put_dequantized
from fedtune.models.adapter_folder import StoredAdapter
from fedtune.models.backbone import quiet
from fedtune.models.merge import merge
from fedtune.models.methods import mergeable
from fedtune.models.methods._heads import trained_heads

if TYPE_CHECKING:
    from fedtune.contracts.adapter_state import AdapterState
    from fedtune.export.origin import Origin

__all__ = ["in_memory_note", "split_heads", "merge_adapter", "put_heads", "save", "why_in_memory"]


def why_in_memory(origin: "Origin") -> str:
    """Why the backbone's weights differ from the checkpoint; "" if they do not."""
    if origin.model.init == "random":
        return "the backbone was initialized at random (model.init=random)"
    return "the backbone's weights are quantized and dequantized (peft.init=loftq)" if origin.adapter.over else ""


def in_memory_note(why: str) -> str:
    """The card's sentence on a merge in memory."""
    return f"{why}, so the model was merged in memory"


def save(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Save the model with transformers, after rounding its parameters to `dtype`, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with quiet():
        model.save_pretrained(folder)


def merge_adapter(model: PreTrainedModel, origin: "Origin") -> None:
    """Merge the shifts and the adapter without its head into a float32 backbone, in place. If the adapter was trained on quantized weights,
    those replace the backbone's first. An adapter that cannot be merged is skipped: `export_hf` writes it beside the model.

    Raises:
        ModelError: The model lacks a module of the adapter, or has it in another shape.
    """
    adapter, task = origin.adapter, origin.task
    if adapter.over:
        put_dequantized(model, dataclasses.replace(origin.model, **adapter.over), task, **origin.settings)
    for shift in adapter.shifts:
        merge(model, shift)
    if mergeable(adapter.state.spec.method):
        merge(model, split_heads(model, adapter, task)[1])


def put_heads(model: PreTrainedModel, adapter: StoredAdapter, task: TaskConfig) -> None:
    """Copy the adapter's head into a float32 backbone, in place.

    Raises:
        ModelError: The model lacks the head, or has it in another shape.
    """
    parameters, (heads, _) = dict(model.named_parameters()), split_heads(model, adapter, task)
    with torch.no_grad():
        for name, tensor in heads.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ModelError(f"the adapter's head '{name}' {tuple(tensor.shape)} is not in the backbone: it was trained on another one")
            parameters[name].copy_(tensor)


def split_heads(model: PreTrainedModel, adapter: StoredAdapter, task: TaskConfig) -> "tuple[dict[str, Tensor], AdapterState]":
    """Split an adapter into its heads, which replace parameters of the backbone, and the state without them."""
    own, known, state = trained_heads(model, task), {n for n, _ in model.named_parameters()}, adapter.state
    heads = {n: t for n, t in state.tensors.items() if n.split(".")[0] in own and n in known}
    return {**heads, **adapter.heads}, state.subset([n for n in state.tensors if n not in heads])

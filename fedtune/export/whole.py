"""The merge of a whole model in memory, for the few that cannot be read tensor by tensor; and of any, what is the adapter's head."""

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

__all__ = ["in_memory", "parted", "put_adapter", "put_heads", "save", "why_whole"]


def why_whole(origin: "Origin") -> str:
    """Why the backbone's weights are not what lies in the checkpoint; "" where they are."""
    if origin.model.init == "random":
        return "the backbone was drawn at random (model.init=random)"
    return "the backbone is a quantized one, dequantized (peft.init=loftq)" if origin.adapter.over else ""


def in_memory(why: str) -> str:
    """The sentence that a card keeps of it."""
    return f"{why}, so the model was merged as a whole in memory"


def save(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Write it as transformers does, its parameters rounded to this dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    with quiet():
        model.save_pretrained(folder)


def put_adapter(model: PreTrainedModel, origin: "Origin") -> None:
    """Merge the shifts and the adapter, but for its head, into a float32 backbone, in place; where it counts on quantized weights, into
    those. An adapter that no weights can express is left out: `export_hf` puts it beside the model.

    Raises:
        ModelError: The adapter names a module that the model lacks, or one of another shape.
    """
    adapter, task = origin.adapter, origin.task
    if adapter.over:
        put_dequantized(model, dataclasses.replace(origin.model, **adapter.over), task, **origin.settings)
    for shift in adapter.shifts:
        merge(model, shift)
    if mergeable(adapter.state.spec.method):
        merge(model, parted(model, adapter, task)[1])


def put_heads(model: PreTrainedModel, adapter: StoredAdapter, task: TaskConfig) -> None:
    """Put the adapter's head into a float32 backbone, in place.

    Raises:
        ModelError: The model lacks it, or has one of another shape.
    """
    parameters, (heads, _) = dict(model.named_parameters()), parted(model, adapter, task)
    with torch.no_grad():
        for name, tensor in heads.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ModelError(f"the adapter's head '{name}' {tuple(tensor.shape)} is not in the backbone: it belongs to another one")
            parameters[name].copy_(tensor)


def parted(model: PreTrainedModel, adapter: StoredAdapter, task: TaskConfig) -> "tuple[dict[str, Tensor], AdapterState]":
    """What replaces parameters of the backbone, a classifier's head, and the state without it."""
    own, known, state = trained_heads(model, task), {n for n, _ in model.named_parameters()}, adapter.state
    heads = {n: t for n, t in state.tensors.items() if n.split(".")[0] in own and n in known}
    return {**heads, **adapter.heads}, state.subset([n for n in state.tensors if n not in heads])

"""Merge adapters into a model in memory."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ModelError
from fedtune.models.edits import edits_of

__all__ = ["linear", "merge", "transposed_weights"]


def merge(model: PreTrainedModel, state: AdapterState) -> None:
    """Merge a state (without a head) into the weights of an unwrapped float32 backbone, in place; sums are in float64 and rounded once.

    Raises:
        ModelError: The state's method cannot be merged, or the model lacks a tensor of the state or has it with another shape.
    """
    own, turned = dict(model.named_parameters(remove_duplicate=False)), transposed_weights(model)
    modules = dict(model.named_modules())
    sizes = {n: tuple(p.shape) for n, p in own.items()}
    edits = edits_of([state], {}, sizes, turned, lambda module: linear(modules, module))
    with torch.no_grad():
        for name, some in edits.items():
            weight = own[name].cpu().double()
            weight = weight.T if name in turned else weight
            for edit in some:
                weight = edit(weight, 0, len(weight))
            own[name].copy_(weight.T if name in turned else weight)


def transposed_weights(model: nn.Module) -> set[str]:
    """Names of the weights stored as (in, out), as in GPT-2's linear layers."""
    return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}


def linear(modules: Mapping[str, nn.Module], name: str) -> Any:
    """The linear layer of this name.

    Raises:
        ModelError: There is no such linear layer, or its weight is tied to the embedding.
    """
    layer = modules.get(name)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ModelError(f"the adapter changes '{name}', which is not a linear layer of the backbone: it belongs to another backbone")
    if any(layer.weight is m.weight for m in modules.values() if isinstance(m, nn.Embedding)):
        raise ModelError(f"the adapter changes '{name}', whose weight is tied to the embedding: it cannot be merged")
    return layer

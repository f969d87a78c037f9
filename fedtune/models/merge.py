"""Adapters merged into a model that is in memory."""

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
    """Put a state (without head) into the weights of a bare float32 backbone, in place; sums in float64, rounded once.

    Raises:
        ModelError: No weights can express the state's method, or the state names what the model lacks, or has another shape.
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
    """Names of the weights that are kept as (in, out), as GPT-2's linear layers are."""
    return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}


def linear(modules: Mapping[str, nn.Module], name: str) -> Any:
    """The linear layer of that name, whose weight is its own.

    Raises:
        ModelError: There is none, or its weight is tied to the embedding.
    """
    layer = modules.get(name)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ModelError(f"the adapter changes '{name}', which is no linear layer of the backbone: it belongs to another one")
    if any(layer.weight is m.weight for m in modules.values() if isinstance(m, nn.Embedding)):
        raise ModelError(f"the adapter changes '{name}', whose weight is tied to the embedding: it cannot be merged")
    return layer

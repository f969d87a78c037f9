"""BitFit: train only the backbone's biases, in linear layers and norms.

Source: Ben Zaken et al. 2022, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models,
arXiv:2106.10199.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import Attached
from fedtune.models.methods._own import untouched
from fedtune.models.methods.full import edits, initial, is_noop  # relative to the backbone's own tensors, as in full fine-tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "edits", "is_noop", "initial"]


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """Train every bias. For a bf16 backbone, train a float32 master copy that each forward pass rounds.

    Raises:
        ModelError: The backbone has no bias.
    """
    from fedtune.models.methods._heads import train_head, trained_heads  # imported late, because they load transformers
    from fedtune.models.parts import text_prefix

    heads = trained_heads(model, task)
    prefix = text_prefix(model)
    biases = [n for n, _ in model.named_parameters() if n.endswith(".bias") and n.startswith(prefix) and n.split(".")[0] not in heads]
    if not biases:
        kind = model.config.model_type
        raise ModelError(f"peft.method=bitfit trains biases, but this '{kind}' has none: take peft=lora, or a backbone with biases")
    parameters, names = {}, {}
    for name in biases:
        module, own = model.get_submodule(name.removesuffix(".bias")), name
        dtype = model.get_parameter(name).dtype
        if dtype is not torch.float32:
            module.bias = nn.Parameter(model.get_parameter(name).float())
            register_parametrization(module, "bias", _Rounded(dtype), unsafe=True)  # unsafe: the rounded bias has another dtype
            own = f"{name.removesuffix('bias')}parametrizations.bias.original"
        parameters[name], names[name] = model.get_parameter(own).requires_grad_(True), own
    origin = {n: p.detach().clone() for n, p in parameters.items()}
    head = train_head(model, task)
    before = {p: origin[n] for n, p in parameters.items()} | {p: p.detach().clone() for p in head.values()}
    return Attached(
        model=model, parameters=parameters | head, names=names | {n: n for n in head}, disabled=untouched(before), origin=origin
    )


class _Rounded(nn.Module):
    """Rounds a float32 master copy to the backbone's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)

"""Full fine-tuning: every weight of the backbone is trained. The baseline that the other methods are measured against."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import Attached
from fedtune.models.methods.heads import train_head
from fedtune.models.methods.own import untouched
from fedtune.models.parts import text_prefix
from fedtune.state import AdapterState


def attach(model: PreTrainedModel, peft: PeftConfig, task: TaskConfig) -> Attached:
    """Train every parameter of the text part; tied and shared ones count once, under their first name.

    Raises:
        ModelError: The backbone is not in float32.
    """
    head = train_head(model, task)
    prefix = text_prefix(model)
    own = {n: p for n, p in model.named_parameters() if n not in head and n.startswith(prefix)}
    for name, parameter in own.items():
        # meta: a server that learns names and shapes, in whatever dtype config.json names
        if parameter.dtype is not torch.float32 and parameter.device.type != "meta":
            raise ModelError(
                f"peft.method=full trains the weights themselves, and small steps vanish in the {str(parameter.dtype)[6:]} of '{name}':"
                " take model.precision=fp32"
            )
        parameter.requires_grad_(True)
    origin = {n: p.detach().clone() for n, p in own.items()}
    before = {p: origin[n] for n, p in own.items()} | {p: p.detach().clone() for p in head.values()}
    parameters = own | head
    return Attached(model=model, parameters=parameters, names={n: n for n in parameters}, disabled=untouched(before), origin=origin)


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: torch.Generator, std: float) -> Tensor:
    """Zeros: the state is what the weights have moved."""
    return torch.zeros(shape)


def merge(model: PreTrainedModel, state: AdapterState) -> None:
    """W ← W + Δ, summed in float64 and rounded once.

    Raises:
        ModelError: The state names what the model lacks, or has another shape.
    """
    own = dict(model.named_parameters())
    for name, delta in state.tensors.items():
        if name not in own or own[name].shape != delta.shape:
            raise ModelError(f"the state's '{name}' {tuple(delta.shape)} is not a tensor of the backbone: load the same checkpoint")
    with torch.no_grad():
        for name, delta in state.tensors.items():
            own[name].copy_(own[name].double() + delta.double())

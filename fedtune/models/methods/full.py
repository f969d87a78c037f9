"""Full fine-tuning: every weight of the backbone is trained. The baseline for the other methods."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.config import PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models.methods import Attached, Change, Edit
from fedtune.models.methods._own import untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedtune.contracts.adapter_state import AdapterState

fp32_only = True


def attach(model: "PreTrainedModel", peft: PeftConfig, task: TaskConfig) -> Attached:
    """Train every parameter of the text part; tied and shared parameters count once, under their first name.

    Raises:
        ModelError: The backbone is not in float32.
    """
    from fedtune.models.methods._heads import train_head  # imported late, because it loads transformers
    from fedtune.models.parts import linear_layers, text_prefix

    head = train_head(model, task)
    prefix = text_prefix(model)
    own = {n: p for n, p in model.named_parameters() if n not in head and n.startswith(prefix)}
    for name, parameter in own.items():
        # on the meta device a server only lists names and shapes; the dtype does not matter
        if parameter.dtype is not torch.float32 and parameter.device.type != "meta":
            raise ModelError(
                f"peft.method=full trains the weights themselves, and '{name}' loses small steps in {str(parameter.dtype)[6:]}:"
                " take model.precision=fp32"
            )
        parameter.requires_grad_(True)
    origin = {n: p.detach().clone() for n, p in own.items()}
    before = {p: origin[n] for n, p in own.items()} | {p: p.detach().clone() for p in head.values()}
    parameters = own | head
    return Attached(
        model=model, parameters=parameters, names={n: n for n in parameters}, disabled=untouched(before), origin=origin,
        keeps_inputs=linear_layers(model),
    )  # fmt: skip


def initial(name: str, shape: tuple[int, ...], peft: PeftConfig, generator: torch.Generator, std: float) -> Tensor:
    """Zeros: the state is the change of the weights."""
    return torch.zeros(shape)


def edits(state: "AdapterState", sizes: Mapping[str, tuple[int, ...]]) -> Iterator[Change]:
    """W ← W + Δ."""
    for name, delta in state.tensors.items():
        yield Change(name=name, shape=tuple(delta.shape), edit=_added(delta))


def is_noop(state: "AdapterState") -> bool:
    """Whether no weight has changed."""
    return bool(state.tensors) and not any(t.any() for t in state.tensors.values())


def _added(delta: Tensor) -> Edit:
    return lambda rows, first, last: rows + delta[first:last].double()

"""LoRA and heads by hand: one flat batch through the frozen backbone, each client's delta one slice of a batched product.

x (C, B·T, in) @ Aᵀ (C, in, r) @ Bᵀ (C, r, out). Rows of different clients never meet in the backbone, so whatever its layers are (quantized
ones too, whose weights are then dequantized once for all clients), they run as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from fedtune.models import LiveAdapter
from fedtune.models.losses import counted_logits
from fedtune.simulations.engines.client_batch import Crowd, Forward, shared_dropout


def why_not(live: LiveAdapter) -> str | None:
    """Why this model has no stacked form; None where it has."""
    if drawn := shared_dropout(live):
        return drawn
    for name, (module, own) in _owners(live).items():
        if isinstance(module, LoraLayer):
            if getattr(module, "lora_variant", {}):
                return f"{live.spec.method} has no stacked form"
        elif not isinstance(module, (nn.Linear, nn.LayerNorm)) or any(n not in live.parameters for n in own.values()):
            return f"'{name}' belongs to a {type(module).__name__}, which has no stacked form"
    return None


@contextmanager
def installed(live: LiveAdapter, crowd: Crowd) -> Iterator[Forward]:
    """Within it, the model's LoRA layers, heads and dropouts work client by client."""
    changed: dict[nn.Module, Callable[..., Tensor]] = {}
    for name, (module, own) in _owners(live).items():
        if isinstance(module, LoraLayer):
            changed[module] = _lora(crowd, name.rpartition(".")[0], module)
        elif isinstance(module, nn.Linear):
            changed[module] = _linear(crowd, own)
        elif isinstance(module, nn.LayerNorm):
            changed[module] = _norm(crowd, own, module)
    for module in live.model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            changed[module] = _dropout(crowd, module.p)
    try:
        for module, stand_in in changed.items():
            module.forward = stand_in  # type: ignore[method-assign]
        yield lambda batch, task: counted_logits(live.model, batch, task)
    finally:
        for module in changed:
            del module.forward  # the class's own is under it


def _owners(live: LiveAdapter) -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """Canonical name → the module that computes with it, and that module's own parameter names → canonical names."""
    modules, found = dict(live.model.named_modules()), {}
    for name, dotted in live.names.items():
        path = dotted.split(".lora_")[0] if ".lora_" in dotted else dotted.rpartition(".")[0]
        prefix = name.rpartition(".")[0]
        found[name] = modules[path], {own: f"{prefix}.{own}" for own, _ in modules[path].named_parameters(recurse=False)}
    return found


def _split(crowd: Crowd, x: Tensor) -> Tensor:
    """(C·B, …, in) → (C, B·…, in)"""
    return x.reshape(len(crowd), -1, x.shape[-1])


def _lora(crowd: Crowd, name: str, module: Any) -> Callable[..., Tensor]:
    base, dropout = module.base_layer, module.lora_dropout["default"]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, a, b = base(x, *args, **kwargs), crowd.views[f"{name}.lora_A"], crowd.views[f"{name}.lora_B"]
        delta = torch.bmm(torch.bmm(_split(crowd, dropout(x.to(a.dtype))), a.transpose(1, 2)), b.transpose(1, 2))
        return y + (delta * crowd.scaling[name][:, None, None]).view(y.shape).to(y.dtype)

    return forward


def _linear(crowd: Crowd, own: Mapping[str, str]) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = crowd.views[own["weight"]], crowd.views[own["bias"]] if "bias" in own else None
        y = torch.bmm(_split(crowd, x.to(weight.dtype)), weight.transpose(1, 2))
        y = y if bias is None else y + bias[:, None]
        return y.view(*x.shape[:-1], weight.shape[1])

    return forward


def _norm(crowd: Crowd, own: Mapping[str, str], module: nn.LayerNorm) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = _split(crowd, F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)) * crowd.views[own["weight"]][:, None]
        return (y + crowd.views[own["bias"]][:, None] if "bias" in own else y).view(x.shape)

    return forward


def _dropout(crowd: Crowd, p: float) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        return crowd.drop(x.view(len(crowd), -1, *x.shape[1:]), p).view(x.shape)

    return forward

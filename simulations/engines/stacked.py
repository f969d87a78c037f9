"""Batches LoRA and heads explicitly: one flat batch through the frozen backbone, and the clients' deltas as one batched product.

x (C, B·T, in) @ Aᵀ (C, in, r) @ Bᵀ (C, r, out). Rows do not interact in the backbone, so its layers run unchanged, including quantized
ones, whose weights are dequantized once for all clients. Where the lean step can train the model, it does so here, with the same factors.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.models import LiveAdapter
from fedtune.models.lean import step_of
from fedtune.models.losses import counted_logits
from fedtune.simulations.engines.client_batch import ClientBatch, Forward, shared_dropout


def why_not(live: LiveAdapter) -> str | None:
    """Why this model cannot be stacked; None if it can."""
    if drawn := shared_dropout(live):
        return drawn
    for name, (module, own) in _owners(live).items():
        if isinstance(module, ParamWrapper):
            return f"'{name}' belongs to stacked experts, which have no stacked form"
        if isinstance(module, LoraLayer):
            if getattr(module, "lora_variant", {}):
                return f"{live.spec.method} has no stacked form"
        elif not isinstance(module, (nn.Linear, nn.LayerNorm)) or any(n not in live.parameters for n in own.values()):
            return f"'{name}' belongs to a {type(module).__name__}, which has no stacked form"
    return None


@contextmanager
def installed(live: LiveAdapter, clients: ClientBatch) -> Iterator[Forward]:
    """A context in which the model's LoRA layers, heads and dropouts work per client."""
    changed: dict[nn.Module, Callable[..., Tensor]] = {}
    lora: dict[nn.Module, str] = {}
    for name, (module, own) in _owners(live).items():
        if isinstance(module, LoraLayer):
            lora[module] = name.rpartition(".")[0]
            changed[module] = _lora(clients, lora[module], module)
        elif isinstance(module, nn.Linear):
            changed[module] = _linear(clients, own)
        elif isinstance(module, nn.LayerNorm):
            changed[module] = _norm(clients, own, module)
    for module in live.model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            changed[module] = _dropout(clients, module.p)
    try:
        for module, stand_in in changed.items():
            module.forward = stand_in  # type: ignore[method-assign]
        yield lambda batch, task: _losses(live, clients, lora, batch, task)
    finally:
        for module in changed:
            del module.forward  # restores the class's method


def _losses(
    live: LiveAdapter, clients: ClientBatch, names: Mapping[nn.Module, str], batch: Mapping[str, Tensor], task: TaskConfig
) -> Tensor:
    """The losses of `Forward`, by the lean step if it can compute them."""
    step = step_of(live.model)
    if step is None or step.draws_dropout():  # the lean layers draw dropout for all rows together
        return task_of(task).loss(*counted_logits(live.model, batch, task), "none")

    def factors(module: nn.Module) -> tuple[Tensor, Tensor]:
        name = names[module]
        return clients.views[f"{name}.lora_A"], clients.views[f"{name}.lora_B"] * clients.scaling[name][:, None, None]

    with step.stacked(factors, batch, clients.rows):
        if (losses := step.token_losses(batch, task)) is not None:
            return losses
        with step.installed(batch):
            return task_of(task).loss(*counted_logits(live.model, batch, task), "none")


def _owners(live: LiveAdapter) -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """Return canonical name → (the module that uses it, that module's parameter names → canonical names)."""
    modules, found = dict(live.model.named_modules()), {}
    for name, dotted in live.names.items():
        path = dotted.split(".lora_")[0] if ".lora_" in dotted else dotted.rpartition(".")[0]
        prefix = name.rpartition(".")[0]
        found[name] = modules[path], {own: f"{prefix}.{own}" for own, _ in modules[path].named_parameters(recurse=False)}
    return found


def _split(clients: ClientBatch, x: Tensor) -> Tensor:
    """(C·B, …, in) → (C, B·…, in)"""
    return x.reshape(len(clients), -1, x.shape[-1])


def _lora(clients: ClientBatch, name: str, module: Any) -> Callable[..., Tensor]:
    base, dropout = module.base_layer, module.lora_dropout["default"]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, a, b = base(x, *args, **kwargs), clients.views[f"{name}.lora_A"], clients.views[f"{name}.lora_B"]
        delta = torch.bmm(torch.bmm(_split(clients, dropout(x.to(a.dtype))), a.transpose(1, 2)), b.transpose(1, 2))
        return y + (delta * clients.scaling[name][:, None, None]).view(y.shape).to(y.dtype)

    return forward


def _linear(clients: ClientBatch, own: Mapping[str, str]) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = clients.views[own["weight"]], clients.views[own["bias"]] if "bias" in own else None
        y = torch.bmm(_split(clients, x.to(weight.dtype)), weight.transpose(1, 2))
        y = y if bias is None else y + bias[:, None]
        return y.view(*x.shape[:-1], weight.shape[1])

    return forward


def _norm(clients: ClientBatch, own: Mapping[str, str], module: nn.LayerNorm) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = _split(clients, F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)) * clients.views[own["weight"]][:, None]
        return (y + clients.views[own["bias"]][:, None] if "bias" in own else y).view(x.shape)

    return forward


def _dropout(clients: ClientBatch, p: float) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        return clients.drop(x.view(len(clients), -1, *x.shape[1:]), p).view(x.shape)

    return forward

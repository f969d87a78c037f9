"""A cache of each training row's hidden states below the lowest adapter.

If only the top k layers have adapters, the layers below never change and need no gradient. The hidden states that enter the lowest trained
layer are computed once per run and then read from a memory-mapped file, for every client and round. The key is the row's tokens, so the
trainer and the batched engine need no change.
"""

import hashlib
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.clients.tokens import Spill
from fedtune.errors import ConfigError
from fedtune.models import LiveAdapter
from fedtune.models.backbone import dropout_rates, head_names


class LowerLayers:
    """Hooks a model so that cached rows skip the lower layers in training.

    Args:
        live: The model with its adapter.
        most_bytes: Maximum size of the file; rows that do not fit are recomputed each time.

    Raises:
        ConfigError: A parameter below the adapters is trained, or the backbone uses dropout.
    """

    def __init__(self, live: LiveAdapter, most_bytes: float) -> None:
        path, layers = _layers(live.backbone.model)
        self._first, self._most = _lowest(live, path, layers), most_bytes
        self._lower = [layers[i] for i in range(self._first)]
        self._frozen = [p for layer in self._lower for p in layer.parameters()]
        self._spill, self._known, self._bytes = Spill(), dict[bytes, int](), 0
        self._rows: list[np.ndarray] = []
        self._mask: Tensor | None = None
        self._tuples, self.hits, self.misses = False, 0, 0
        stack = _stack_owner(live.backbone.model, path)
        stack.register_forward_pre_hook(self._enter, with_kwargs=True)
        stack.register_forward_hook(self._leave, always_call=True)
        layers[0].register_forward_hook(self._shape)
        layers[self._first].register_forward_pre_hook(self._keep, with_kwargs=True)

    def clear(self) -> None:
        """Drop all rows, after a change of the frozen weights."""
        self._spill, self._bytes = Spill(), 0
        self._known.clear()

    def _enter(self, stack: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not torch.is_grad_enabled() or ids is None or mask is None or any(p.requires_grad for p in self._frozen):
            return  # an evaluation, or a turn that measures gradients of the backbone's weights
        try:
            values, real = ids.cpu().numpy(), mask.bool().cpu().numpy()
        except RuntimeError:  # tensors inside torch.func.vmap have no readable values
            return
        keys = [hashlib.sha256(row[shown].tobytes()).digest() for row, shown in zip(values, real, strict=True)]
        if all(key in self._known for key in keys):
            self.hits += 1
            self._skip(self._read(keys, mask, stack))
        else:
            self.misses += 1
            self._keys, self._mask = keys, mask.bool()

    def _skip(self, hidden: Tensor) -> None:
        for layer in self._lower:
            layer.forward = lambda *args, **kwargs: (hidden,) if self._tuples else hidden  # type: ignore[method-assign]

    def _shape(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._tuples = isinstance(output, tuple)

    def _keep(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._mask is None:
            return
        hidden, mask, self._mask = _hidden(args, kwargs).detach(), self._mask, None
        self._dtype, self._width = hidden.dtype, hidden.shape[-1]
        for key, row, shown in zip(self._keys, hidden, mask, strict=True):
            data = row[shown].contiguous().cpu().view(torch.uint8).numpy().tobytes()
            if key not in self._known and self._bytes + len(data) <= self._most:
                self._known[key] = self._spill.write(data)
                self._bytes += len(data)

    def _read(self, keys: list[bytes], mask: Tensor, stack: nn.Module) -> Tensor:
        """(B, T, width); zeros at padding positions, because no token attends to them."""
        shown = mask.bool()
        size = self._width * torch.empty((), dtype=self._dtype).element_size()
        rows = [self._spill.array(self._known[key], int(n) * size, np.uint8) for key, n in zip(keys, shown.sum(1).tolist(), strict=True)]
        flat = torch.from_numpy(np.concatenate(rows)).view(self._dtype).view(-1, self._width).to(mask.device)
        out = torch.zeros(*mask.shape, self._width, dtype=self._dtype, device=mask.device)
        out[shown] = flat
        return out

    def _leave(self, stack: nn.Module, args: Any, output: Any) -> None:
        self._mask = None
        for layer in self._lower:
            layer.__dict__.pop("forward", None)


def _hidden(args: Any, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    depth = getattr(model.config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise ConfigError(f"engine.cache_layers: the architecture '{model.config.model_type}' has no single stack of layers: set it to 0")
    return found[0]


def _stack_owner(model: nn.Module, path: str) -> nn.Module:
    """The innermost module around the layers whose forward takes `input_ids`."""
    while path := path.rpartition(".")[0]:
        if "input_ids" in inspect.signature(model.get_submodule(path).forward).parameters:
            break
    return model.get_submodule(path)


def _lowest(live: LiveAdapter, path: str, layers: nn.ModuleList) -> int:
    """Index of the lowest layer with a trained parameter."""
    model = live.backbone.model
    if drawn := dropout_rates(model.config):
        raise ConfigError(f"engine.cache_layers: the backbone draws dropout ({', '.join(drawn)}), so no row can be cached: set it to 0")
    own, mine = {id(p): n for n, p in model.named_parameters()}, []
    for name, parameter in live.parameters.items():
        inside = own.get(id(parameter), "")
        if inside.startswith(f"{path}."):
            mine.append(int(inside.removeprefix(f"{path}.").split(".")[0]))
        elif inside.split(".")[0] not in head_names(model):
            raise ConfigError(f"engine.cache_layers: '{name}' is trained and changes the lower layers: set it to 0")
    lowest = min(mine, default=len(layers) - 1)
    if lowest == 0:
        raise ConfigError("engine.cache_layers: the first layer has an adapter, so no layer lies below: see peft.targets, or set it to 0")
    return lowest

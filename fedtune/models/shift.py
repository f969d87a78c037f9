"""Merge shifts into the frozen weights of a live model: W = W0 + Σ s·B·A."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ModelError
from fedtune.models.side import SideBranch


class FrozenWeights:
    """The linear weights of a backbone with merged shifts.

    For each changed weight, W0 and the float32 sum Σ s·B·A are stored. Otherwise a low-precision weight would lose small shifts to
    rounding, and adding the sum at once could give other weights than adding the shifts one by one. A quantized weight does not change; a
    side branch adds its shifts.

    Args:
        model: The backbone, with or without a PEFT adapter around its layers.

    Attributes:
        versions: Versions of the merged shifts, in order.
        start: The shift of version 0, with which a warm start begins; None if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = _linears(model)
        floating = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
        self._dtype = next(floating, torch.float32)  # dtype of the unquantized frozen weights, which is the compute dtype
        self._first: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._branches: dict[str, SideBranch] = {}
        self.versions: tuple[int, ...] = ()
        self.start: AdapterState | None = None

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """A context with the weights before round 1: W0, plus the shift of version 0 if there is one.

        Raises:
            ModelError: The shift of version 0 came only as part of a snapshot.
        """
        if not any(self.versions):
            yield
            return
        if 0 in self.versions and self.start is None:
            raise ModelError("this client lacks the model that the run started from: restart it")
        first = {m: self.start.product(m) for m in self.start.spec.scaling} if self.start else {}
        hidden, own = list(self._branches.values()), []
        try:
            for branch in hidden:
                branch.on = False
            for module in first.keys() & self._branches.keys():
                own.append(SideBranch(self._modules[module], self._dtype, module))
                own[-1].add(cast(AdapterState, self.start))
            with torch.no_grad():
                for module, total in self._sums.items():
                    self._move(module, first[module].to(total.device) if module in first else torch.zeros_like(total))
            yield
        finally:
            for branch in own:
                branch.remove()
            for branch in hidden:
                branch.on = True
            with torch.no_grad():
                for module, total in self._sums.items():
                    self._move(module, total)

    def reset(self, fresh: nn.Module) -> None:
        """Restore W0 from `fresh`, the same backbone loaded again; weights that no shift has changed, such as a head, stay unchanged."""
        own = _linears(fresh)
        for branch in self._branches.values():
            branch.remove()
        with torch.no_grad():
            for name in self._sums:
                cast(Tensor, self._modules[name].weight).copy_(cast(Tensor, own[name].weight))
        self._first, self._sums, self._branches, self.versions, self.start = {}, {}, {}, (), None

    def add(self, *shifts: AdapterState, snapshot: AdapterState | None = None) -> None:
        """Merge shifts, oldest first, then set the sums of the snapshot's modules. If one is invalid, nothing changes.

        Args:
            shifts: Shifts of method `lora`, without the snapshot's modules.
            snapshot: `<module>.weight` (out, in): the sum of all shifts so far, including `shifts`.

        Raises:
            ModelError: A shift names a module that is not a linear layer of the backbone or has another shape.
        """
        for shift in shifts:
            for module in shift.spec.scaling:
                self._check_factors(module, shift)
        sums = {name.removesuffix(".weight"): total for name, total in snapshot.tensors.items()} if snapshot else {}
        for module, total in sums.items():
            self._check(module, tuple(total.shape))
        with torch.no_grad():
            for shift in shifts:
                for module in shift.spec.scaling:
                    if (branch := self._branch(module)) is not None:
                        branch.add(shift)
                    else:
                        self._move(module, self._sum(module).add_(shift.product(module).to(self._sum(module).device)))
            for module, total in sums.items():
                if (branch := self._branch(module)) is not None:
                    branch.replace(total)
                else:
                    self._move(module, self._sum(module).copy_(total))
        self.versions = (*self.versions, *(s.spec.version for s in shifts))
        self.start = next((s for s in shifts if s.spec.version == 0 and snapshot is None), self.start)

    def _branch(self, module: str) -> SideBranch | None:
        """A quantized layer's side branch; None if the layer is not quantized."""
        layer = self._modules[module]
        if cast(Tensor, layer.weight).is_floating_point():
            return None
        if module not in self._branches:
            self._branches[module] = SideBranch(layer, self._dtype, module)
        return self._branches[module]

    def _sum(self, module: str) -> Tensor:
        if module not in self._sums:
            weight = cast(Tensor, self._modules[module].weight)
            self._first[module] = weight.detach().clone()
            shape = weight.T.shape if isinstance(self._modules[module], Conv1D) else weight.shape  # Conv1D stores W as (in, out)
            self._sums[module] = torch.zeros(shape, device=weight.device)
        return self._sums[module]

    def _move(self, module: str, total: Tensor) -> None:
        layer, first = self._modules[module], self._first[module]
        cast(Tensor, layer.weight).copy_(first.float() + (total.T if isinstance(layer, Conv1D) else total))

    def _check_factors(self, module: str, shift: AdapterState) -> None:
        self._check(module)
        a, b = shift.tensors.get(f"{module}.lora_A"), shift.tensors.get(f"{module}.lora_B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise ModelError(f"the shapes of a shift's A and B of '{module}' do not match: the shift is damaged")
        self._check(module, (len(b), a.shape[1]))

    def _check(self, module: str, shape: tuple[int, ...] | None = None) -> None:
        """Raises ModelError if the backbone has no such linear layer of the shape (out, in) = `shape`."""
        layer = self._modules.get(module)
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise ModelError(f"a shift changes '{module}', which is not a linear layer of this backbone: load the same checkpoint")
        weight = cast(Tensor, layer.weight)
        shape = shape[::-1] if shape is not None and isinstance(layer, Conv1D) else shape
        # a 4-bit weight is packed, so only its layer stores the shape
        own = tuple(weight.shape) if weight.is_floating_point() else (layer.out_features, layer.in_features)
        if shape not in (None, own):
            raise ModelError(f"a shift changes '{module}' by {shape}, but the backbone's is {own}: load the same checkpoint")


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Canonical module name → the frozen linear layer, without PEFT's wrapper."""
    found = {n: getattr(m, "base_layer", m) for n, m in model.named_modules()}
    return {n: m for n, m in found.items() if isinstance(m, (nn.Linear, Conv1D))}

"""A side branch that adds shifts to a quantized layer. Quantizing the sum again would lose small changes to rounding.

y = Q(W0)·x + Σ s·B·(A·x)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.contracts.adapter_state import AdapterState

__all__ = ["SideBranch"]


class SideBranch:
    """A forward hook that adds the shifts' output to the layer's output.

    The factors have the layer's compute dtype, often 16 bits: a factor's rounding error is relative and does not lose small shifts. If the
    factors become larger than the matrix, their float32 sum replaces them. The sum is computed from the original shifts, so that it does
    not depend on how a client received them (one by one or as a snapshot).

    Args:
        layer: A quantized linear layer, (in) → (out).
        dtype: Its compute dtype.
        module: Its name in the shifts.

    Attributes:
        on: Whether it adds anything.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, module: str) -> None:
        weight: Any = layer.weight
        self._module, self._shifts = module, list[AdapterState]()
        self._a = torch.empty(0, int(layer.in_features), dtype=dtype, device=weight.device)  # type: ignore[arg-type]
        self._b = torch.empty(int(layer.out_features), 0, dtype=dtype, device=weight.device)  # type: ignore[arg-type]
        self._dense: Tensor | None = None
        self.on = True
        self._handle = layer.register_forward_hook(self)

    def add(self, shift: AdapterState) -> None:
        """Add a shift s·B·A, with A (R, in) and B (out, R)."""
        if self._dense is not None:
            self._dense += shift.product(self._module).to(self._dense.device)
            return
        a, b = shift[f"{self._module}.lora_A"], shift.spec.scaling[self._module] * shift[f"{self._module}.lora_B"].float()
        self._shifts.append(shift)
        self._a, self._b = torch.cat([self._a, a.to(self._a)]), torch.cat([self._b, b.to(self._b)], dim=1)
        if self._a.numel() + self._b.numel() > len(self._b) * self._a.shape[1]:
            total = torch.zeros(len(self._b), self._a.shape[1])
            for one in self._shifts:
                total += one.product(self._module)
            self.replace(total)

    def replace(self, total: Tensor) -> None:
        """Set the sum of all shifts so far to `total` (out, in)."""
        self._dense = total.to(self._a.device, torch.float32, copy=True)
        self._a, self._b, self._shifts = self._a[:0], self._b[:, :0], []

    def remove(self) -> None:
        """Remove the branch from the layer."""
        self._handle.remove()

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """The hook."""
        if not self.on:
            return y
        x = args[0].to(self._a.dtype)
        part = F.linear(F.linear(x, self._a), self._b) if self._dense is None else F.linear(x, self._dense.to(x.dtype))
        return y + part.to(y.dtype)

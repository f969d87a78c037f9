"""A layer of a model as one autograd function, and what the layers of a forward pass share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedtune.models.lean.functions import Factors, Gradients, Linear, Needed, States
from fedtune.models.lean.places import Places

__all__ = ["Call", "Kept", "Layer", "Pass"]

Kept = list[Tensor | None]

_ALIGNMENT = 64  # bytes


class Pass:
    """What the layers of one forward pass share.

    Args:
        places: The positions that they compute.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self._shared: dict[int, tuple[Any, Any]] = {}
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def mask(self, given: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask to add to scores, (B or 1, 1, T, T), from transformers' mask: bool, float, or None for a causal one."""
        if given is None:
            return None
        lowest = torch.finfo(dtype).min
        if given.dtype is torch.bool:
            return self._once(given, lambda: torch.zeros_like(given, dtype=dtype).masked_fill_(~given, lowest))
        return self._once(given, lambda: given.to(dtype).clamp(min=lowest))

    def rotation(self, given: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (B or 1, T, R)."""
        return self._once(given[0], lambda: (given[0].to(dtype), given[1].to(dtype)))

    def store(self, y: Tensor, kept: Kept, left: int) -> tuple[Tensor, Kept]:
        """A layer's output and what it keeps, copied to one block of memory for this layer and those after it, `left` in all; on a GPU,
        unchanged.

        In the heap, a layer's temporary tensors would leave holes between the tensors that stay, too small for those of the next layer. A
        large block also returns to the system as soon as it is free.
        """
        if y.device.type != "cpu":
            return y, kept
        sizes = [0 if t is None else -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in (y, *kept)]
        if self._used + sum(sizes) > len(self._block):  # the first layer, or one of another size
            self._block, self._used = torch.empty(sum(sizes) * left, dtype=torch.uint8), 0
        out, memory = Kept(), self._block.untyped_storage()
        for tensor, size in zip((y, *kept), sizes, strict=True):
            if tensor is not None:  # not a view: autograd counts a change of one view as a change of all
                own = cast(Any, tensor.new_empty(0))
                tensor = own.set_(memory, self._used // tensor.itemsize, tensor.shape).copy_(tensor)
            out.append(tensor)
            self._used += size
        if left == 1:  # the tensors alone hold the block now, which is free after the backward pass of these layers
            self._block = torch.empty(0, dtype=torch.uint8)
        return cast(Tensor, out[0]), out[1:]

    def _once(self, source: Any, make: Callable[[], Any]) -> Any:
        if id(source) not in self._shared:
            self._shared[id(source)] = source, make()  # the source too, so that its id is not given to another tensor
        return self._shared[id(source)][1]


class Call:
    """One call of a layer: its mask, its rotary embedding, the generator's states before dropout, and whether it keeps tensors."""

    def __init__(self, run: Pass, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, *, keeps: int) -> None:
        self.run, self.keeps, self.places = run, keeps, run.places
        self.mask = run.mask(mask, x.dtype)
        self.rotation: tuple[Tensor, ...] = run.rotation(rotation, x.dtype) if rotation else ()
        self.states = States(run.places)


class Layer(ABC):
    """A layer of a transformers model.

    Args:
        module: The layer, in which PEFT may have adapted linear layers.
        linears: Its linear layers, in the order of `forward`'s factors.

    Attributes:
        module: The layer.
        linears: Its linear layers.
        frozen: Its parameters that are not LoRA factors.
    """

    def __init__(self, module: Any, linears: Sequence[Linear]) -> None:
        self.module, self.linears = module, list(linears)
        factors = {id(f) for linear in linears for f in linear.factors}
        self.frozen = [p for p in module.parameters() if id(p) not in factors]

    def __call__(self, run: Pass, x: Tensor, mask: Tensor | None, rotation: tuple[Tensor, Tensor] | None, *, keeps: int) -> Tensor:
        """The layer's output, of the shape of x.

        Args:
            run: The forward pass.
            x: (1, N, hidden), with N computed positions, or (B, T, hidden).
            mask, rotation: As in `Pass`; None without rotary embedding.
            keeps: 0: keep no intermediate tensors, the backward pass computes them again; otherwise the number of layers that keep theirs,
                from this one to the last.
        """
        call = Call(run, x, mask, rotation, keeps=keeps)
        flat = [f for linear in self.linears for f in linear.factors]
        return cast(Tensor, _Function.apply(self, call, x.flatten(0, 1), *flat)).view_as(x)

    @abstractmethod
    def forward(self, x: Tensor, factors: Factors, call: Call, *, last: bool = True) -> tuple[Tensor, Kept]:
        """y (N, hidden) and the tensors that `backward` needs. With last=False, only these tensors are needed, and y may be wrong."""

    @abstractmethod
    def backward(
        self, dy: Tensor, x: Tensor, kept: Kept, factors: Factors, needed: Needed, call: Call, *, dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        """dx (N, hidden), or None if not wanted, and the gradients of the factors of all linear layers."""


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, call: Call, x: Tensor, *factors: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, kept = layer.forward(x, _triples(factors), call)
        if call.keeps and any(ctx.needs_input_grad[2:]):  # otherwise autograd keeps nothing
            y, kept = call.run.store(y, kept, call.keeps)
        ctx.layer, ctx.call = layer, call
        ctx.save_for_backward(x, *factors, *(kept if call.keeps else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer, call, at = ctx.layer, ctx.call, 1 + 3 * len(ctx.layer.linears)
        x, factors, kept = ctx.saved_tensors[0], _triples(ctx.saved_tensors[1:at]), list(ctx.saved_tensors[at:])
        if not call.keeps:
            kept = layer.forward(x, factors, call, last=False)[1]
        dx, grads = layer.backward(dy, x, kept, factors, _triples(ctx.needs_input_grad[3:]), call, dx=ctx.needs_input_grad[2])
        return None, None, dx, *grads


def _triples(flat: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))

"""Unmerged LoRA factors, selected per span."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.layout import home_of, linears
from fedtune.inference.engine.native.structures import LoraPiece, LoraStructure
from fedtune.inference.engine.shape import Shape


@dataclass(slots=True)
class Lora:
    """One adapter: (layer, linear) → pieces (a [r, K], bᵀ [r, n], the first of its n output columns)."""

    pieces: dict[tuple[int, str], list[tuple[Tensor, Tensor, int]]] = field(default_factory=dict)
    _structure: LoraStructure | None = field(default=None, init=False)

    def add(self, where: tuple[int, str], x: Tensor, y: Tensor) -> None:
        """y += x aᵀ bᵀ, in place; x [n, K], y [n, N]."""
        for a, b, column in self.pieces.get(where, ()):
            y[:, column : column + b.shape[1]].addmm_(x @ a.T, b)

    def structure(self, shape: Shape) -> LoraStructure:
        """The adapter for native code, which reads the pieces where they are; made once."""
        if self._structure is None:
            starts, pieces = [0], list[LoraPiece]()
            for layer in range(shape.layers):
                for i, linear in enumerate(linears(shape)):
                    for a, b, first in self.pieces.get((layer, linear), ()):
                        (rank, n_in), n = a.shape, b.shape[1]
                        if rank:
                            pieces.append(LoraPiece(linear=i, rank=rank, n_in=n_in, first=first, n=n, a=a.data_ptr(), b=b.data_ptr()))
                starts.append(len(pieces))
            self._structure = LoraStructure(
                layers=shape.layers,
                count=len(pieces),
                starts=(ctypes.c_int64 * len(starts))(*starts),
                pieces=(LoraPiece * len(pieces))(*pieces),
            )
        return self._structure


def make_lora(shape: Shape, factors: Mapping[str, tuple[Tensor, Tensor]], name: str) -> Lora:
    """Build an adapter from its modules' factors.

    Args:
        shape: The model's shape.
        factors: Module, such as `model.layers.0.self_attn.q_proj` → A [r, K] with the scaling s multiplied in, and B [N, r].
        name: The adapter's name, for error sentences.

    Raises:
        ModelError: The engine does not support adapters on a module, or factors do not fit it.
    """
    lora = Lora()
    for module, (a, b) in factors.items():
        layer, _, own = module.removeprefix("model.layers.").partition(".")
        home = home_of(shape, own)
        if home is None or not layer.isdecimal() or int(layer) >= shape.layers or not module.startswith("model.layers."):
            raise ModelError(f"adapter {name!r} changes '{module}', which the engine cannot adapt: merge it with `fedtune export`")
        linear, first, part = home
        columns = linears(shape)[linear].columns
        if a.dim() != 2 or a.shape[1] != columns or b.shape != (part.rows, a.shape[0]):
            raise ModelError(f"adapter {name!r} does not fit '{module}' of shape {(part.rows, columns)}: it belongs to another model")
        b = b.float() if part.order is None else b.float()[part.order]
        lora.pieces.setdefault((int(layer), linear), []).append((a.float().contiguous(), b.T.contiguous(), first))
    return lora


def add_all(loras: Sequence[tuple[slice, Lora]], where: tuple[int, str], x: Tensor, y: Tensor) -> None:
    """Apply each adapter to its rows of y, in place."""
    for rows, lora in loras:
        lora.add(where, x[rows], y[rows])

"""Unmerged LoRA factors, selected per span."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.inference.engine.layout import home_of, linears
from fedtune.inference.engine.native.structures import LoraPiece, LoraStructure
from fedtune.inference.engine.shape import Shape

Floats = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Lora:
    """One adapter: (layer, linear) → pieces (a [r, K], bᵀ [r, n], the first of its n output columns), which add x aᵀ bᵀ to y."""

    pieces: dict[tuple[int, str], list[tuple[Floats, Floats, int]]] = field(default_factory=dict)
    _structure: LoraStructure | None = field(default=None, init=False)

    def structure(self, shape: Shape) -> LoraStructure:
        """The adapter for native code, which reads the pieces where they are; made once."""
        if self._structure is None:
            starts, pieces = [0], list[LoraPiece]()
            for layer in range(shape.layers):
                for i, linear in enumerate(linears(shape)):
                    for a, b, first in self.pieces.get((layer, linear), ()):
                        (rank, n_in), n = a.shape, b.shape[1]
                        if rank:
                            pieces.append(LoraPiece(linear=i, rank=rank, n_in=n_in, first=first, n=n, a=a.ctypes.data, b=b.ctypes.data))
                starts.append(len(pieces))
            self._structure = LoraStructure(
                layers=shape.layers,
                count=len(pieces),
                starts=(ctypes.c_int64 * len(starts))(*starts),
                pieces=(LoraPiece * len(pieces))(*pieces),
            )
        return self._structure


def make_lora(shape: Shape, factors: Mapping[str, tuple[Floats, Floats]], name: str) -> Lora:
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
        if a.ndim != 2 or a.shape[1] != columns or b.shape != (part.rows, a.shape[0]):
            raise ModelError(f"adapter {name!r} does not fit '{module}' of shape {(part.rows, columns)}: it belongs to another model")
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        b = b if part.order is None else b[part.order]
        lora.pieces.setdefault((int(layer), linear), []).append((np.ascontiguousarray(a), np.ascontiguousarray(b.T), first))
    return lora

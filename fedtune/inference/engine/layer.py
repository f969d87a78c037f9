"""One transformer block of the decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.layout import order_of_norm
from fedtune.inference.engine.linear import Linear
from fedtune.inference.engine.shape import Shape

__all__ = ["Layer", "make_layer"]

Floats = NDArray[np.float32]


@dataclass(slots=True, kw_only=True)
class Layer:
    """One transformer block: norms with their offset; linears fused."""

    norm: Floats | None = None  # [d]
    qkv: Linear  # d -> (H + 2 Hkv) D; rows of q and k in pairs
    o: Linear
    q_norm: Floats | None = None  # [D] or, over all heads, [H D], in pairs
    k_norm: Floats | None = None
    o_norm: Floats | None = None  # [d], of attention's output
    mlp_norm: Floats | None = None  # [d]
    gate_up: Linear  # d -> 2 * intermediate
    down: Linear
    down_norm: Floats | None = None  # [d], of the MLP's output


def make_layer(shape: Shape, linears: Mapping[str, Linear], norm: Callable[[str], Floats]) -> Layer:
    """Build a layer.

    Args:
        shape: The decoder's shape.
        linears: The decoder's linears of the layer: qkv, o, gate_up, down.
        norm: Returns a norm's weight by its name in the checkpoint's layer.
    """
    offset = np.float32(shape.norm_offset)
    parts: dict[str, Any] = dict(linears)
    parts |= {place: norm(name) + offset for place, name in shape.norms.items()}
    if shape.qk_norm:
        parts |= {f"{x}_norm": (norm(f"self_attn.{x}_norm") + offset)[order_of_norm(shape, x)] for x in "qk"}
    return Layer(**parts)

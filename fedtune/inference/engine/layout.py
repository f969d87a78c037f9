"""How the linears of a checkpoint's layer become the decoder's: which are fused, and in which order their rows are."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.rope import pairs
from fedtune.inference.engine.shape import Shape

__all__ = ["Fused", "Part", "home_of", "linears", "norm_sizes", "order_of_norm"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A linear of the checkpoint: `self_attn.q_proj`, its rows, and the order of its rows in the decoder (None: as stored)."""

    module: str
    rows: int
    order: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Fused:
    """A linear of the decoder: the checkpoint's linears whose rows it holds, one after the other, with their common input."""

    parts: tuple[Part, ...]
    columns: int
    bias: bool

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(part.module for part in self.parts)


@lru_cache(maxsize=8)
def linears(shape: Shape) -> Mapping[str, Fused]:
    """The decoder's linears of a layer by name (qkv, o, gate_up, down), in the order of the pass."""
    d, inner, width = shape.hidden, shape.intermediate, shape.head_dim
    q, kv = shape.heads * width, shape.kv_heads * width
    turned = pairs(shape.heads, width, shape.rotary), pairs(shape.kv_heads, width, shape.rotary)
    if shape.fused:
        order = np.concatenate([turned[0], q + turned[1], np.arange(q + kv, q + 2 * kv)])
        qkv = (Part(module="self_attn.qkv_proj", rows=q + 2 * kv, order=order),)
        gate_up = (Part(module="mlp.gate_up_proj", rows=2 * inner),)
    else:
        qkv = (
            Part(module="self_attn.q_proj", rows=q, order=turned[0]),
            Part(module="self_attn.k_proj", rows=kv, order=turned[1]),
            Part(module="self_attn.v_proj", rows=kv),
        )
        gate_up = (Part(module="mlp.gate_proj", rows=inner), Part(module="mlp.up_proj", rows=inner))
    return {
        "qkv": Fused(parts=qkv, columns=d, bias=shape.qkv_bias),
        "o": Fused(parts=(Part(module="self_attn.o_proj", rows=d),), columns=q, bias=shape.o_bias),
        "gate_up": Fused(parts=gate_up, columns=d, bias=shape.mlp_bias),
        "down": Fused(parts=(Part(module="mlp.down_proj", rows=d),), columns=inner, bias=shape.mlp_bias),
    }


def home_of(shape: Shape, module: str) -> tuple[str, int, Part] | None:
    """The decoder's linear that holds a module's rows, the first of these rows, and the module; None if there is none."""
    for name, fused in linears(shape).items():
        first = 0
        for part in fused.parts:
            if part.module == module:
                return name, first, part
            first += part.rows
    return None


def norm_sizes(shape: Shape) -> dict[str, int]:
    """The norms of a layer by name in the checkpoint, with their sizes: first those of hidden states, then those of queries and keys."""
    sizes = dict.fromkeys(shape.norms.values(), shape.hidden)
    if shape.qk_norm:
        heads = (shape.heads, shape.kv_heads) if shape.qk_norm_whole else (1, 1)
        sizes |= {f"self_attn.{x}_norm": n * shape.head_dim for x, n in zip("qk", heads, strict=True)}
    return sizes


def order_of_norm(shape: Shape, x: str) -> NDArray[np.int64]:
    """The order of the weights of `q_norm` (x = q) or `k_norm` (x = k) in the decoder."""
    heads = {"q": shape.heads, "k": shape.kv_heads}[x] if shape.qk_norm_whole else 1
    return pairs(heads, shape.head_dim, shape.rotary)

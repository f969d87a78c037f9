"""Passes through the decoder's layers by torch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu, silu

from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.layer import Layer
from fedtune.inference.engine.linear import Linear
from fedtune.inference.engine.lora import Lora
from fedtune.inference.engine.reference.attention import attend, soft_cap
from fedtune.inference.engine.reference.linears import apply
from fedtune.inference.engine.reference.tensors import as_array, as_tensor
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape
from fedtune.inference.engine.threads import wanted

__all__ = ["run_head", "run_layers"]

Attend = Callable[[Cache, int, Tensor, Tensor, Tensor, Rope], Tensor]

if (count := wanted()) is not None:  # torch was not loaded yet when it was set
    torch.set_num_threads(count)


@torch.inference_mode()
def run_layers(
    shape: Shape,
    layers: Sequence[tuple[int, Layer, Rope]],
    hidden: Tensor,
    spans: Sequence[Span],
    loras: Sequence[tuple[slice, Lora]] = (),
    attend: Attend = attend,
    linear: Callable[[Linear, Tensor], Tensor] = apply,
) -> Tensor:
    """Run layers on hidden states [rows, d] of prepared caches.

    Args:
        shape: The decoder's shape.
        layers: The layers to run, each with its index and rotary embedding.
        hidden: [rows, d] float32; changed in place.
        spans: One per sequence.
        loras: The rows of each separate adapter.
        attend: Stores a sequence's keys and values and attends.
        linear: Computes a linear's product.
    """
    rows, heads, kv_heads, width = len(hidden), shape.heads, shape.kv_heads, shape.head_dim
    act = silu if shape.activation == "silu" else _gelu_tanh

    def product(i: int, name: str, own: Linear, x: Tensor) -> Tensor:
        y = linear(own, x)
        for part, lora in loras:
            for a, b, column in lora.pieces.get((i, name), ()):
                y[part, column : column + b.shape[1]] += x[part] @ as_tensor(a).T @ as_tensor(b)
        return y

    for i, layer, rope in layers:
        x = _norm(hidden, layer.norm, shape.eps)
        q, k, v = product(i, "qkv", layer.qkv, x).view(rows, -1, width).split((heads, kv_heads, kv_heads), 1)
        q, k = _head_norm(q, layer.q_norm, shape.eps), _head_norm(k, layer.k_norm, shape.eps)
        q = q if shape.query_scale == 1 else q * shape.query_scale
        parts, at = list[Tensor](), 0
        for span in spans:
            own = slice(at, at + span.n)
            parts.append(attend(span.cache, i, q[own], k[own], v[own], rope))
            at += span.n
        x = torch.cat(parts).reshape(rows, heads * width)
        hidden += _norm(product(i, "o", layer.o, x), layer.o_norm, shape.eps)
        x = _norm(hidden, layer.mlp_norm, shape.eps)
        gate, up = product(i, "gate_up", layer.gate_up, x).chunk(2, 1)
        x = act(gate).mul_(up)
        hidden += _norm(product(i, "down", layer.down, x), layer.down_norm, shape.eps)
    return hidden


@torch.inference_mode()
def run_head(shape: Shape, norm: NDArray[np.float32], head: Linear, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits [rows, V] of hidden states [rows, d]."""
    return as_array(soft_cap(apply(head, _norm(as_tensor(hidden), norm, shape.eps)), shape.logit_cap))


def _gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _norm(x: Tensor, weight: NDArray[np.float32] | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight per row [n, d]; x itself without a norm."""
    return x if weight is None else torch.rms_norm(x, weight.shape, as_tensor(weight), eps)


def _head_norm(x: Tensor, weight: NDArray[np.float32] | None, eps: float) -> Tensor:
    """RMS norm of each head of x [n, H, D] with a weight [D], or of all heads at once with a weight [H D]."""
    if weight is None or len(weight) == x.shape[2]:
        return _norm(x, weight, eps)
    return _norm(x.flatten(1), weight, eps).view(x.shape)

"""Moves a per-channel scale from a linear's inputs into the operation that computes them; exact arithmetic gives the same model.

    x → diag(s)⁻¹ x    a norm's weight, or the rows of the linear before
    W → W diag(s)      every linear that reads x

Sources of the inputs in a Llama-like layer: the norms for q, k, v and for gate, up, if the layer has norms before them; `up` for `down`,
because act(gate) * up is linear in up; `v` for `o`, because attention mixes tokens and not channels. If several query heads share a value
head, their channels share a scale. Where one linear computes q, k and v, or gate and up (Phi-3), only the norms are sources.

Source: SmoothQuant (arXiv:2211.10438) eq. 3 and AWQ (arXiv:2306.00978) §3.2 fold the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.inference.engine.layout import linears
from fedtune.inference.engine.shape import Shape

__all__ = ["Change", "Fold", "changes", "folds"]

Change = Callable[[Tensor, int, int], Tensor]  # rows a..b of a tensor, float32 → the changed rows


@dataclass(frozen=True)
class Fold:
    """A point where a scale can move: `source`'s outputs are the inputs of `readers`. Names within one layer, without `.weight`.

    Args:
        offset: Number that the decoder adds to the weight of `source`, a norm.
    """

    source: str
    readers: tuple[str, ...]
    offset: float = 0.0


def folds(shape: Shape) -> list[Fold]:
    """The folds of a layer, in the order of the pass."""
    fused, norms, out = linears(shape), shape.norms, list[Fold]()
    for place, first, second in (("norm", "qkv", "o"), ("mlp_norm", "gate_up", "down")):
        if place in norms:
            out.append(Fold(norms[place], fused[first].modules, shape.norm_offset))
        if not shape.fused:
            out.append(Fold(fused[first].modules[-1], fused[second].modules))
    return out


def tied(values: Tensor, shared: int, width: int) -> Tensor:
    """Mean over the query heads of each key-value head: [Hkv * shared * width] -> the same shape, equal where shared."""
    return values if shared == 1 else values.view(-1, shared, width).mean(1, keepdim=True).expand(-1, shared, -1).reshape(-1)


def changes(fold: Fold, scale: Tensor, rows: int, width: int = 1) -> dict[str, Change]:
    """Return the change of each tensor of the layer, by name; includes `source`'s bias even if it has none.

    Args:
        scale: [K] scale of the readers' inputs, positive; equal over query heads that share a key-value head.
        rows: Number of outputs of `source`.
        width: Head width, if `source` has fewer outputs than the readers have inputs.
    """
    shared = scale.numel() // rows
    own = scale.view(-1, shared, width)[:, 0].reshape(-1) if shared > 1 else scale

    def divided(part: Tensor, first: int, last: int) -> Tensor:
        return (part + fold.offset) / (own[first:last] if part.dim() == 1 else own[first:last, None]) - fold.offset

    return {
        f"{fold.source}.weight": divided,
        f"{fold.source}.bias": divided,
        **{f"{reader}.weight": lambda part, first, last: part * scale for reader in fold.readers},
    }


def within(scale: Tensor) -> Tensor:
    """Replace invalid scales (0, not finite) with 1, and normalize to √(max · min) = 1."""
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    return scale / (scale.max() * scale.min()).sqrt()

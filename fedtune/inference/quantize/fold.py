"""Moves a per-channel scale from a linear's inputs into the operation that computes them; exact arithmetic gives the same model.

    x → diag(s)⁻¹ x    a norm's weight, or the rows of the linear before
    W → W diag(s)      every linear that reads x

Sources of the inputs in a Llama-family layer: the norms for q, k, v and for gate, up; `up` for `down`, because act(gate) * up is linear in
up; `v` for `o`, because attention mixes tokens and not channels. If several query heads share a value head, their channels share a scale.

Source: SmoothQuant (arXiv:2211.10438) eq. 3 and AWQ (arXiv:2306.00978) §3.2 fold the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FOLDS", "Change", "Fold", "changes"]

Change = Callable[[Tensor, int, int], Tensor]  # rows a..b of a tensor, float32 → the changed rows


@dataclass(frozen=True)
class Fold:
    """A point where a scale can move: `source`'s outputs are the inputs of `readers`. Names within one layer, without `.weight`."""

    source: str
    readers: tuple[str, ...]


FOLDS = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",)),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)


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
        return part / (own[first:last] if part.dim() == 1 else own[first:last, None])

    return {
        f"{fold.source}.weight": divided,
        f"{fold.source}.bias": divided,
        **{f"{reader}.weight": lambda part, first, last: part * scale for reader in fold.readers},
    }


def within(scale: Tensor) -> Tensor:
    """Replace invalid scales (0, not finite) with 1, and normalize to √(max · min) = 1."""
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    return scale / (scale.max() * scale.min()).sqrt()

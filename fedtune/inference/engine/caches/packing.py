"""Asymmetric min/max codes of 8, 4 or 2 bits, several per byte.

q = round((x - low) / scale), scale = (max - min) / (2^bits - 1): algorithms of KIVI (Liu et al. 2024, arXiv:2402.02750, section 3).
``low`` and ``scale`` are stored in float16. They are rounded outward before the codes are computed, so the error is at most half the stored
scale. A group of equal numbers gets scale 1 and codes 0.
"""

import torch
from torch import Tensor

from fedtune.inference.engine.caches.base import CacheError

WIDTHS = (8, 4, 2)
LARGEST = torch.finfo(torch.float16).max


def grid(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return (low, scale) float16 of groups along `dim`, which is kept with size 1.

    Raises:
        CacheError: A number is too large for float16.
    """
    smallest, largest = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if not bool((torch.maximum(smallest.abs(), largest.abs()) < LARGEST).all()):  # also false for NaN
        raise CacheError(
            f"keys or values reach {float(x.abs().max()):g}, too large for float16: use the full cache, as without --kv-budget"
        )
    low = smallest.half()
    low = torch.where(low.float() > smallest, (smallest - smallest.abs() * 2**-11 - 2**-25).half(), low)
    wanted = (largest - low.float()) / (2**bits - 1)
    scale = wanted.half()
    scale = torch.where(scale.float() < wanted, (wanted * (1 + 2**-11) + 2**-25).half(), scale)
    return low, torch.where(scale == 0, torch.ones_like(scale), scale)


def encode(x: Tensor, low: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantize x [..., g, D] float32 to codes packed along the tokens: uint8 [..., g * bits / 8, D].

    Args:
        low, scale: float16, broadcastable to x.
    """
    codes = ((x - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    parts = codes.unflatten(-2, (8 // bits, -1)).unbind(-3)  # the first tokens in the low bits, so that unpacking does not interleave
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << (i * bits)
    return packed


def decode(packed: Tensor, low: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Dequantize the codes of `encode`: float32 [..., g, D]."""
    if bits == 8:
        return torch.addcmul(low.float(), packed.float(), scale.float())
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1, 1)
    codes = ((packed.unsqueeze(-3) >> shifts) & (2**bits - 1)).flatten(-3, -2)
    return torch.addcmul(low.float(), codes.float(), scale.float())


def group_size(width: int, most: int) -> int:
    """Channels per group (the last may have fewer): the minimal number of groups of at most `most`, of nearly equal size.

    >>> group_size(74, 32)
    25
    """
    return -(-width // -(-width // most))


def spread(x: Tensor, size: int, width: int) -> Tensor:
    """[..., groups] -> [..., width]: repeat each group's number for its channels."""
    return x if x.shape[-1] == 1 else x.repeat_interleave(size, -1)[..., :width]

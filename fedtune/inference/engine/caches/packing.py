"""Asymmetric min/max codes of 8, 4 or 2 bits, several per byte.

q = round((x - low) / scale), scale = (max - min) / (2^bits - 1): algorithms of KIVI (Liu et al. 2024, arXiv:2402.02750, section 3).
``low`` and ``scale`` are stored in float16. They are rounded outward before the codes are computed, so the error is at most half the stored
scale. A group of equal numbers gets scale 1 and codes 0.
"""

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.caches.base import CacheError

WIDTHS = (8, 4, 2)
LARGEST = float(np.finfo(np.float16).max)
Floats, Halves, Codes = NDArray[np.float32], NDArray[np.float16], NDArray[np.uint8]


def grid(x: Floats, axis: int, bits: int) -> tuple[Halves, Halves]:
    """Return (low, scale) of groups along `axis`, which is kept with size 1.

    Raises:
        CacheError: A number is too large for float16.
    """
    smallest, largest = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    if not (np.maximum(np.abs(smallest), np.abs(largest)) < LARGEST).all():  # also false for NaN
        raise CacheError(
            f"keys or values reach {float(np.abs(x).max()):g}, too large for float16: use the full cache, as without --kv-budget"
        )
    low = smallest.astype(np.float16)
    lower = (smallest - np.abs(smallest) * np.float32(2**-11) - np.float32(2**-25)).astype(np.float16)
    low = np.where(low.astype(np.float32) > smallest, lower, low)
    wanted = (largest - low.astype(np.float32)) / np.float32(2**bits - 1)
    scale = wanted.astype(np.float16)
    higher = (wanted * np.float32(1 + 2**-11) + np.float32(2**-25)).astype(np.float16)
    scale = np.where(scale.astype(np.float32) < wanted, higher, scale)
    return low, np.where(scale == 0, np.float16(1), scale)


def encode(x: Floats, low: Halves, scale: Halves, bits: int) -> Codes:
    """Quantize x [..., g, D] to codes packed along the tokens: [..., g * bits / 8, D].

    Args:
        low, scale: Broadcastable to x.
    """
    codes = np.rint((x - low.astype(np.float32)) / scale.astype(np.float32)).clip(0, 2**bits - 1).astype(np.uint8)
    # the first tokens in the low bits, so that unpacking does not interleave
    parts = codes.reshape(*x.shape[:-2], 8 // bits, x.shape[-2] * bits // 8, x.shape[-1])
    packed = parts[..., 0, :, :].copy()
    for i in range(1, 8 // bits):
        packed |= parts[..., i, :, :] << np.uint8(i * bits)
    return packed


def decode(packed: Codes, low: Halves, scale: Halves, bits: int) -> Floats:
    """Dequantize the codes of `encode`: [..., g, D]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
    codes = (packed[..., None, :, :] >> shifts) & np.uint8(2**bits - 1)
    codes = codes.reshape(*packed.shape[:-2], packed.shape[-2] * 8 // bits, packed.shape[-1])
    return codes.astype(np.float32) * scale.astype(np.float32) + low.astype(np.float32)


def group_size(width: int, most: int) -> int:
    """Channels per group (the last may have fewer): the minimal number of groups of at most `most`, of nearly equal size.

    >>> group_size(74, 32)
    25
    """
    return -(-width // -(-width // most))


def spread(x: Halves, size: int, width: int) -> Halves:
    """[..., groups] -> [..., width]: repeat each group's number for its channels."""
    return x if x.shape[-1] == 1 else np.repeat(x, size, -1)[..., :width]

"""Packs the positions of the sent entries: as a bitmap, or with Elias–Fano coding if that is smaller.

k of n positions cost about 2 + log2(n / k) bits each, 8.6 at 1 %, instead of 32 for an int32. n and k alone determine the number of bytes,
so a receiver can check it.

Sources: Elias 1974, Efficient Storage and Retrieval by Content and Address of Static Files, J. ACM 21;
Fano 1971, On the Number of Bits Required to Implement an Associative Memory, MIT Project MAC, memo 61.
"""

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import UpdateMismatch


def packed_bytes(count: int, total: int) -> int:
    """Bytes that `pack` needs for `count` of `total` positions; 0 if all are sent."""
    return 0 if count == total else -(-min(total, _bits(count, total)) // 8)


def pack(positions: Tensor, total: int) -> Tensor:
    """Positions (k,) int64, ascending and below `total`, as bytes (packed_bytes(k, total),) uint8."""
    places, count = positions.numpy(), len(positions)
    if count == total:
        return torch.empty(0, dtype=torch.uint8)
    if total <= _bits(count, total):
        bits = np.zeros(total, np.uint8)
        bits[places] = 1
    else:
        low = _low(count, total)
        high = np.zeros(_bits(count, total) - count * low, np.uint8)
        high[(places >> low) + np.arange(count)] = 1  # unary: one zero per increment of the upper part, then a one
        bits = np.concatenate([high, ((places[:, None] >> np.arange(low)) & 1).astype(np.uint8).ravel()])
    return torch.from_numpy(np.packbits(bits))


def unpack(packed: Tensor, count: int, total: int) -> Tensor:
    """The inverse of `pack`.

    Raises:
        UpdateMismatch: The bytes are not `count` ascending positions below `total`.
    """
    if len(packed) != packed_bytes(count, total):
        raise UpdateMismatch(
            f"the positions have {len(packed)} bytes, but {count} of {total} positions take {packed_bytes(count, total)} bytes"
        )
    if count in (0, total):
        return torch.arange(count)
    bits = np.unpackbits(packed.numpy())
    if bits[min(total, _bits(count, total)) :].any():
        raise UpdateMismatch("the positions are damaged: bits are set after the last one")
    if total <= _bits(count, total):
        places = np.flatnonzero(bits)
        good = len(places) == count
    else:
        low = _low(count, total)
        upper = _bits(count, total) - count * low
        ones = np.flatnonzero(bits[:upper])
        good = len(ones) == count
        if good:
            lower = bits[upper : upper + count * low].reshape(count, low).astype(np.int64) @ (1 << np.arange(low))
            places = ((ones - np.arange(count)) << low) + lower
            good = bool((np.diff(places) > 0).all()) and int(places[-1]) < total
    if not good:
        raise UpdateMismatch(f"the positions are damaged: they are not {count} ascending numbers below {total}")
    return torch.from_numpy(places)


def _low(count: int, total: int) -> int:
    """Low bits of a position, which are stored unchanged."""
    return (total // count).bit_length() - 1 if count else 0


def _bits(count: int, total: int) -> int:
    """Bits of the Elias–Fano code."""
    low = _low(count, total)
    return count * (1 + low) + ((total - 1) >> low) if count else 0

"""Converts a linear's portable tensors (see `engine.linear`) to the layout of kernels.h."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.aligned import aligned
from fedtune.inference.engine.bfloat16 import Array, as_float32, to_bfloat16
from fedtune.inference.engine.native.library import KINDS
from fedtune.inference.engine.native.structures import Weights

__all__ = ["PACKED", "nibbles_of", "pack", "weights_of"]

PACKED = ("int4", "int8", "bf16", "fp32")
BLOCK, GROUP = 16, 32  # rows and columns that lie together
_CHUNK = 1 << 21  # weights that are unpacked at once
_OF_ALL, _OF_A_ROW = 0.01, 0.05  # shares of int4's squared rounding error that 8-bit scales may add
Floats, Bytes = NDArray[np.float32], NDArray[np.uint8]


def pack(kind: str, tensors: Mapping[str, Array], n_in: int, group: int) -> dict[str, Array]:
    """Pack a kind; fp32 stays as it is.

    int4's scales and zeros take 8 bits each, in units of a base for 16 rows (4.5 bits a weight), unless that would add more than 1 % to the
    squared rounding error of the weights, or 5 % to that of a row: then they stay bfloat16 (5 bits a weight).

    Args:
        kind: One of `PACKED`.
        tensors: Portable tensors of matching shapes; `bias` is kept.
        n_in: K.
        group: Columns per int4 scale, a multiple of 32.

    Returns:
        `codes`, with `scales` and `base` (int4) or `base` (int8), and `bias` if there is one.
    """
    whole = tensors["weight" if kind in ("bf16", "fp32") else "packed"]
    rows = max(BLOCK, _CHUNK // n_in // BLOCK * BLOCK)
    if kind == "int4":
        out = _int4(tensors, n_in, group, rows)
    elif kind == "fp32":
        out = {"codes": as_float32(whole)}
    else:
        out = {"codes": np.concatenate([_codes(kind, whole[at : at + rows], n_in) for at in range(0, len(whole), rows)])}
    if kind == "int8":
        out["base"] = _padded(as_float32(tensors["scale"])[:, None], BLOCK, 1)[:, 0].copy()
    if "bias" in tensors:
        out["bias"] = tensors["bias"]
    return {name: aligned(array) for name, array in out.items()}


def weights_of(parts: Mapping[str, Array], kind: str, n_in: int, n_out: int) -> Weights:
    """Describe packed parts to the kernels; the parts must outlive the result."""
    wide = kind == "int4" and parts["scales"].shape[-1] == 4 * BLOCK
    out = Weights(kind=KINDS.index("int4 wide" if wide else kind), n_in=n_in, n_out=n_out)
    for name in ("codes", "scales", "base", "bias"):
        if name in parts:
            setattr(out, name, parts[name].ctypes.data)
            setattr(out, f"{name}_bytes", parts[name].nbytes)
    return out


def nibbles_of(packed: Bytes, columns: int) -> Bytes:
    """[N, ceil(columns / 2)] -> [N, columns] of 0..15: portable int4 codes, of which the even column is in the low half."""
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], 2).reshape(len(packed), -1)[:, :columns]


def _padded(rows: Array, block: int, columns: int, value: int = 0) -> Array:
    """Pad a matrix to whole blocks of rows and whole multiples of columns."""
    return np.pad(rows, ((0, -rows.shape[0] % block), (0, -rows.shape[1] % columns)), constant_values=value)


def _codes(kind: str, rows: Array, n_in: int) -> Bytes:
    """Rows of int8 or bfloat16 weights -> [blocks, groups, bytes of a block's group]."""
    groups = -(-n_in // GROUP)
    if kind == "int8":
        parts = _padded(rows.view(np.uint8) ^ 128, BLOCK, GROUP).reshape(-1, BLOCK, groups, 8, 4)
    else:
        parts = _padded(rows, BLOCK, GROUP).reshape(-1, BLOCK, groups, 16, 2)
    return np.ascontiguousarray(parts.transpose(0, 2, 3, 1, 4)).view(np.uint8).reshape(len(parts), groups, -1)


def _int4(tensors: Mapping[str, Array], n_in: int, group: int, rows: int) -> dict[str, Array]:
    groups = -(-n_in // GROUP)
    scale, zero = (np.repeat(as_float32(tensors[part]), group // GROUP, 1)[:, :groups] for part in ("scale", "zero"))
    codes, spread = list[Bytes](), list[Floats]()
    for at in range(0, len(scale), rows):
        packed = tensors["packed"][at : at + rows]
        nibbles = _padded(nibbles_of(packed, n_in), BLOCK, GROUP, value=8)
        off = nibbles.reshape(len(nibbles), groups, GROUP).astype(np.float32) - 8
        spread.append(np.square(off).sum(2)[: len(packed)])
        parts = nibbles.reshape(-1, BLOCK, groups, 2, 4, 4)
        both = parts[:, :, :, 0] | parts[:, :, :, 1] << np.uint8(4)
        codes.append(both.transpose(0, 2, 3, 1, 4).reshape(len(both), groups, -1))
    return {"codes": np.concatenate(codes), **_int4_scales(scale, zero, np.concatenate(spread))}


def _int4_scales(scale: Floats, zero: Floats, spread: Floats) -> dict[str, Array]:
    """Pack scales and zeros [N, groups]; `spread` is a group's sum of squares of (code - 8)."""
    scale = np.where(spread > 0, scale, np.float32(0))  # of a group of equal weights, which are its zero
    s, z = (_padded(t, BLOCK, 1).reshape(-1, BLOCK, t.shape[1]).transpose(0, 2, 1) for t in (scale, zero))  # [blocks, groups, 16]
    base = np.stack([s.max((1, 2)) / np.float32(255), np.abs(z).max((1, 2)) / np.float32(127)], 1)
    unit = np.where(base > 0, base, np.float32(1))
    short = np.rint(s / unit[:, :1, None]).clip(0, 255), np.rint(z / unit[:, 1:, None]).clip(-127, 127)
    off = [
        np.square((had - base[:, i, None, None] * now).transpose(0, 2, 1).reshape(-1, scale.shape[1])[: len(scale)])
        for i, (had, now) in enumerate(zip((s, z), short, strict=True))
    ]
    added, error = (off[0] * spread + off[1] * GROUP).sum(1), np.square(scale).sum(1) * np.float32(GROUP / 12)
    if (added <= _OF_A_ROW * error).all() and float(added.sum()) <= _OF_ALL * float(error.sum()):
        return {"scales": np.concatenate([short[0].astype(np.uint8), short[1].astype(np.int8).view(np.uint8)], 2), "base": base}
    wide = to_bfloat16(np.concatenate([s, z], 2))
    return {"scales": wide.view(np.uint8), "base": np.ones_like(base)}

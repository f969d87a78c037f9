"""Converts a linear's portable tensors (see `engine.linear`) to the layout of kernels.h."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedtune.inference.engine.native.library import KINDS
from fedtune.inference.engine.native.structures import Weights

__all__ = ["PACKED", "pack", "weights_of"]

PACKED = ("int4", "int8", "bf16")
BLOCK, GROUP = 16, 32  # rows and columns that lie together
_CHUNK = 1 << 21  # weights that are unpacked at once
_OF_ALL, _OF_A_ROW = 0.01, 0.05  # shares of int4's squared rounding error that 8-bit scales may add


def pack(kind: str, tensors: Mapping[str, Tensor], n_in: int, group: int) -> dict[str, Tensor]:
    """Pack int4, int8 or bf16.

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
    whole = tensors["weight" if kind == "bf16" else "packed"]
    rows = max(BLOCK, _CHUNK // n_in // BLOCK * BLOCK)
    if kind == "int4":
        out = _int4(tensors, n_in, group, rows)
    else:
        out = {"codes": torch.cat([_codes(kind, chunk, n_in) for chunk in whole.split(rows)])}
    if kind == "int8":
        out["base"] = _padded(tensors["scale"].float()[:, None], BLOCK, 1)[:, 0].contiguous()
    if "bias" in tensors:
        out["bias"] = tensors["bias"].contiguous()
    return out


def weights_of(parts: Mapping[str, Tensor], kind: str, n_in: int, n_out: int) -> Weights:
    """Describe packed parts to the kernels; the parts must outlive the result."""
    wide = kind == "int4" and parts["scales"].shape[-1] == 4 * BLOCK
    out = Weights(kind=KINDS.index("int4 wide" if wide else kind), n_in=n_in, n_out=n_out)
    for name in ("codes", "scales", "base", "bias"):
        if name in parts:
            setattr(out, name, parts[name].data_ptr())
            setattr(out, f"{name}_bytes", parts[name].nbytes)
    return out


def _padded(rows: Tensor, block: int, columns: int, value: int = 0) -> Tensor:
    """Pad a matrix to whole blocks of rows and whole multiples of columns."""
    return pad(rows, (0, -rows.shape[1] % columns, 0, -rows.shape[0] % block), value=value)


def _codes(kind: str, rows: Tensor, n_in: int) -> Tensor:
    """Rows of int8 or bfloat16 weights -> [blocks, groups, bytes of a block's group] uint8."""
    if kind == "int8":
        parts = _padded(rows.view(torch.uint8) ^ 128, BLOCK, GROUP).view(-1, BLOCK, -(-n_in // GROUP), 8, 4)
    else:
        parts = _padded(rows.contiguous().view(torch.int16), BLOCK, GROUP).view(-1, BLOCK, -(-n_in // GROUP), 16, 2)
    return parts.permute(0, 2, 3, 1, 4).contiguous().view(torch.uint8).view(parts.shape[0], parts.shape[2], -1)


def _int4(tensors: Mapping[str, Tensor], n_in: int, group: int, rows: int) -> dict[str, Tensor]:
    groups = -(-n_in // GROUP)
    scale, zero = (tensors[part].float().repeat_interleave(group // GROUP, 1)[:, :groups] for part in ("scale", "zero"))
    codes, spread = [], []
    for packed in tensors["packed"].split(rows):
        nibbles = torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :n_in]
        nibbles = _padded(nibbles, BLOCK, GROUP, value=8)
        spread.append((nibbles.view(nibbles.shape[0], groups, GROUP).float() - 8).square_().sum(2)[: packed.shape[0]])
        parts = nibbles.view(-1, BLOCK, groups, 2, 4, 4)
        both = parts[:, :, :, 0] | parts[:, :, :, 1] << 4
        codes.append(both.permute(0, 2, 3, 1, 4).reshape(both.shape[0], groups, -1))
    return {"codes": torch.cat(codes), **_int4_scales(scale, zero, torch.cat(spread))}


def _int4_scales(scale: Tensor, zero: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """Pack scales and zeros [N, groups]; `spread` is a group's sum of squares of (code - 8)."""
    scale = torch.where(spread > 0, scale, 0.0)  # of a group of equal weights, which are its zero
    s, z = (_padded(t, BLOCK, 1).view(-1, BLOCK, t.shape[1]).transpose(1, 2) for t in (scale, zero))  # [blocks, groups, 16]
    base = torch.stack([s.amax((1, 2)) / 255, z.abs().amax((1, 2)) / 127], 1)
    unit = torch.where(base > 0, base, 1.0)
    short = (s / unit[:, :1, None]).round_().clamp_(0, 255), (z / unit[:, 1:, None]).round_().clamp_(-127, 127)
    off = [
        (had - base[:, i, None, None] * now).transpose(1, 2).reshape(-1, scale.shape[1])[: scale.shape[0]].square_()
        for i, (had, now) in enumerate(zip((s, z), short, strict=True))
    ]
    added, error = (off[0] * spread + off[1] * GROUP).sum(1), scale.square().sum(1) * (GROUP / 12)
    if bool((added <= _OF_A_ROW * error).all()) and float(added.sum()) <= _OF_ALL * float(error.sum()):
        return {"scales": torch.cat([short[0].to(torch.uint8), short[1].to(torch.int8).view(torch.uint8)], 2), "base": base}
    wide = torch.cat([s, z], 2).to(torch.bfloat16).contiguous()
    return {"scales": wide.view(torch.uint8), "base": torch.ones_like(base)}

"""GPTQ and AWQ checkpoints in Hugging Face's formats: 4-bit weights W [N, K] in groups of g columns, w = (q - z) * scale, q and z in 0..15.

    gptq   qweight int32 [K/8, N]: eight rows of qᵀ in one number, the first in the lowest bits
           qzeros int32 [K/g, N/8]: eight columns of zᵀ, minus 1 (format `gptq_v2`: as they are); scales float16 [K/g, N]
           g_idx int32 [K]: the group of each column of W
    awq    qweight int32 [K, N/8] and qzeros int32 [K/g, N/8]: eight columns of qᵀ and zᵀ in one number, in the order 0 2 4 6 1 3 5 7 from
           the lowest bits; scales float16 [K/g, N]

Source: AutoGPTQ's qlinear_cuda_old.py and AutoAWQ's modules/linear/gemm.py, which write these formats.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.gptq_config import Packing

__all__ = ["pack_codes", "packed_tensors", "unpack_weight"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GPTQ_ORDER = tuple(range(8))


def packed_tensors(packing: Packing, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a weight [N, K]: name → dtype and shape. N and K are multiples of 8, K of the group."""
    groups = columns // (columns if packing.group == -1 else packing.group)
    zeros = {"qzeros": (torch.int32, (groups, rows // 8)), "scales": (torch.float16, (groups, rows))}
    if packing.format == "awq":
        return {"qweight": (torch.int32, (columns, rows // 8)), **zeros}
    return {"qweight": (torch.int32, (columns // 8, rows)), **zeros, "g_idx": (torch.int32, (columns,))}


def pack_codes(packing: Packing, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """Pack q [N, K] and z [N, G] in 0..15, and scale [N, G]."""
    q, z = codes.T.to(torch.int32), (zero.T.to(torch.int32) - packing.offset) & 15
    order = _AWQ_ORDER if packing.format == "awq" else _GPTQ_ORDER
    out = {"qzeros": _joined(z.unflatten(1, (-1, 8)), 2, order), "scales": scale.T.half().contiguous()}
    if packing.format == "awq":
        return {"qweight": _joined(q.unflatten(1, (-1, 8)), 2, order), **out}
    index = torch.arange(len(q), dtype=torch.int32) // (len(q) if packing.group == -1 else packing.group)
    return {"qweight": _joined(q.unflatten(0, (-1, 8)), 1, order), **out, "g_idx": index}


def unpack_weight(packing: Packing, read: Callable[[str], Tensor], size: tuple[int, int], name: str) -> Tensor:
    """The weight [N, K], float32.

    Args:
        read: Returns a tensor of the linear by its short name, such as `qweight`; raises KeyError if there is none.
        size: N, K.
        name: The linear's name in errors.

    Raises:
        ModelError: A tensor is missing, or has another dtype or shape.
    """
    tensors = dict[str, Tensor]()
    rows, columns = size
    fits = rows % 8 == columns % 8 == 0 and columns % (columns if packing.group == -1 else packing.group) == 0
    for part, (dtype, shape) in packed_tensors(packing, rows, columns).items() if fits else ():
        try:
            tensors[part] = read(part)
        except KeyError:
            if part != "g_idx":
                raise ModelError(f"'{name}.{part}' is missing: config.json and the weights do not belong together") from None
            continue
        found = tensors[part]
        if tuple(found.shape) != shape or not (found.is_floating_point() if part == "scales" else found.dtype == dtype):
            raise ModelError(f"'{name}.{part}' is {tuple(found.shape)}, not {shape}: config.json and the weights do not belong together")
    if not fits:
        raise ModelError(f"'{name}' is {size}, which groups of {packing.group} columns do not fit: the checkpoint is damaged")
    order = _AWQ_ORDER if packing.format == "awq" else _GPTQ_ORDER
    q = _split(tensors["qweight"], 2, order).flatten(1) if packing.format == "awq" else _split(tensors["qweight"], 1, order).flatten(0, 1)
    z = (_split(tensors["qzeros"], 2, order).flatten(1) + packing.offset) & 15
    groups = len(tensors["scales"])
    index = tensors["g_idx"].long() if "g_idx" in tensors else torch.arange(columns) // (columns // groups)
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise ModelError(f"'{name}.g_idx' names a group beyond {groups}: the checkpoint is damaged")
    return ((q - z[index]).float() * tensors["scales"].float()[index]).T.contiguous()


def _joined(parts: Tensor, axis: int, order: tuple[int, ...]) -> Tensor:
    """Join eight numbers 0..15 along an axis, order[i] at bit 4 i."""
    out = torch.zeros_like(parts.select(axis, 0))
    for i, place in enumerate(order):
        out |= parts.select(axis, place) << 4 * i
    return out.contiguous()


def _split(packed: Tensor, axis: int, order: tuple[int, ...]) -> Tensor:
    """The inverse of `_joined`, with the eight numbers in a new axis."""
    return torch.stack([packed >> 4 * order.index(place) & 15 for place in range(8)], axis)

"""Round-to-nearest quantization, and the number formats of the engine's linears.

    int4   w ~ (q - 8) * scale + zero    q in 0..15, scale and zero per row and group of columns: torch's `_weight_int4pack_mm_for_cpu`
    int8   w ~ q * scale                 q in -127..127, scale per row (a8w8)

and of 4-bit checkpoints for other programs (see `engine.gptq_awq`), whose scales are float16:

    int4s  w ~ (q - 8) * scale           q in 0..15: symmetric
    int4z  w ~ (q - z) * scale           q and z in 0..15: the zero point z is a code

The last group of a row may be smaller: 172 columns in groups of 32 are five groups and one of 12.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedtune.errors import ModelError

__all__ = [
    "GROUP",
    "Grid",
    "Kind",
    "QuantizedLinear",
    "dequantize",
    "fit_grid",
    "pack_int4",
    "portable_tensors",
    "quantize_rtn",
    "relative_error",
    "unpack_int4",
]

Kind = Literal["int4", "int8", "int4s", "int4z"]
GROUP = 32  # smallest group of the int4 kernel
_STRETCH = 1 << 17  # weights that are unpacked at once
INT4_GROUPS = (32, 64, 128, 256)  # groups that the kernel supports


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid of values for a weight [N, K], uniform per group of columns.

    scale [N, G], zero [N, G] (float32; for int4 rounded to bfloat16, as in the kernel), G = ceil(K / group). The zero of int4z is
    (8 - z) * scale.
    """

    kind: Kind
    group: int  # columns; K if a row is one group
    scale: Tensor
    zero: Tensor

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest q, before the 8 that 4-bit kinds add."""
        return (-127, 127) if self.kind == "int8" else (-8, 7)

    def codes(self, weight: Tensor, first: int = 0) -> Tensor:
        """The nearest codes of columns `first`.. of the weight, [N, k] -> [N, k] float32, within `bounds`."""
        scale, zero = self._of(first, weight.shape[1])
        return torch.clamp(torch.round((weight - zero) / scale), *self.bounds)

    def values(self, codes: Tensor, first: int = 0) -> Tensor:
        """The values of codes, [N, k] -> [N, k] float32."""
        scale, zero = self._of(first, codes.shape[1])
        return codes * scale + zero

    def _of(self, first: int, n: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(first, first + n) // self.group
        return self.scale[:, at], self.zero[:, at]


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """A linear's weight in the portable format of packages.

    Attributes:
        kind, group: As in `Grid`; int8's group is 0, a whole row.
        tensors: int4: `packed` uint8 [N, ceil(K / 2)], the even column in the low nibble; `scale`, `zero` bfloat16 [N, ceil(K / group)].
            int8: `packed` int8 [N, K]; `scale` float32 [N]. int4s and int4z: `packed` as for int4; `scale` float16 and `zero` (z) uint8
            [N, ceil(K / group)].
        columns: K.
        error: ‖Q(W) − W‖ / ‖W‖ (Frobenius).
        output_error: ‖X Q(W)ᵀ − X Wᵀ‖ / ‖X Wᵀ‖ over the inputs X of the calibration text; None without text.
    """

    kind: Kind
    group: int
    tensors: dict[str, Tensor]
    columns: int
    error: float
    output_error: float | None = None


def fit_grid(weight: Tensor, kind: Kind, group: int) -> Grid:
    """Fit a grid to each group's minimum and maximum (int4, int4z), or to its greatest magnitude (int8, int4s).

    Args:
        weight: [N, K] float32, finite.
        group: Columns; 0 for int8: a row is one group.

    Raises:
        ModelError: The kernel does not support the group, or the weight is not finite.
    """
    if kind != "int8" and group not in INT4_GROUPS:
        raise ModelError(f"int4 supports groups of {', '.join(map(str, INT4_GROUPS))} columns, not {group}")
    if kind == "int8" and group:
        raise ModelError(f"int8 has one scale per row (group 0), not one per {group} columns")
    if not torch.isfinite(weight).all():
        raise ModelError(f"a weight {tuple(weight.shape)} has values that are not finite: train or merge the model again")
    group = group or weight.shape[1]
    short = -weight.shape[1] % group
    if short:  # repeat the last column, which changes no extreme
        weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], 1)
    grouped = weight.float().unflatten(1, (-1, group))
    if kind == "int8":
        scale = grouped.abs().amax(2) / 127
        return Grid(kind=kind, group=group, scale=torch.where(scale > 0, scale, 1.0), zero=torch.zeros_like(scale))
    if kind in ("int4s", "int4z"):
        return _float16_grid(grouped, kind, group)
    low, high = grouped.amin(2), grouped.amax(2)
    step = ((high - low) / 15).bfloat16().float()  # rounded before the codes are chosen, so that they compensate
    zero = ((low + high) / 2 + step / 2).bfloat16().float()  # codes -8..7: the middle of the range is half a step lower
    return Grid(kind=kind, group=group, scale=torch.where(step > 0, step, 1.0), zero=zero)  # a constant group needs no steps


def _float16_grid(grouped: Tensor, kind: Kind, group: int) -> Grid:
    """The grid of int4s or int4z for groups [N, G, group]. The scale is rounded to float16 before the codes are chosen."""
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    step = grouped.abs().amax(2) / 7.5 if kind == "int4s" else (high - low) / 15
    scale = step.half().float()
    if not torch.isfinite(scale).all():
        raise ModelError("a weight is beyond the range of float16 scales: use --to edge --quantize int4")
    scale = torch.where(scale > 0, scale, 1.0)
    z = torch.full_like(scale, 8) if kind == "int4s" else torch.round(-low / scale).clamp(0, 15)
    return Grid(kind=kind, group=group, scale=scale, zero=(8 - z) * scale)


def quantize_rtn(weight: Tensor, kind: Kind, group: int = GROUP) -> tuple[Grid, Tensor]:
    """Return grid and codes [N, K] of the weight, rounded to nearest; raises like `fit_grid`."""
    grid = fit_grid(weight, kind, group)
    return grid, grid.codes(weight.float())


def packed(grid: Grid, codes: Tensor, weight: Tensor, output_error: float | None = None) -> QuantizedLinear:
    """Convert a weight [N, K] and its codes [N, K] to the portable format."""
    if grid.kind == "int4":
        tensors = {"packed": pack_int4(codes + 8), "scale": grid.scale.bfloat16(), "zero": grid.zero.bfloat16()}
    elif grid.kind != "int8":
        zero = (8 - torch.round(grid.zero / grid.scale)).to(torch.uint8)
        tensors = {"packed": pack_int4(codes + 8), "scale": grid.scale.half(), "zero": zero}
    else:
        tensors = {"packed": codes.to(torch.int8), "scale": grid.scale[:, 0].clone()}
    return QuantizedLinear(
        kind=grid.kind,
        group=0 if grid.kind == "int8" else grid.group,
        tensors=tensors,
        columns=codes.shape[1],
        error=relative_error(grid.values(codes), weight),
        output_error=output_error,
    )


def dequantize(linear: QuantizedLinear) -> Tensor:
    """Convert a portable weight to [N, K] float32."""
    packed, columns = linear.tensors["packed"], linear.columns
    out = torch.empty(len(packed), columns)
    for first in range(0, len(packed), step := max(_STRETCH // columns, 1)):
        part = {name: tensor[first : first + step] for name, tensor in linear.tensors.items()}
        scale = part["scale"].float()
        if linear.kind == "int8":
            torch.mul(part["packed"], scale[:, None], out=out[first : first + step])
        else:
            zero = part["zero"].float() if linear.kind == "int4" else (8 - part["zero"].float()) * scale
            grid = Grid(kind=linear.kind, group=linear.group, scale=scale, zero=zero)
            out[first : first + step] = grid.values(unpack_int4(part["packed"], columns).float() - 8)
    return out


def portable_tensors(kind: Kind, group: int, size: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a portable weight [N, K]: name → dtype and shape."""
    (rows, columns), groups = size, (size[0], math.ceil(size[1] / (group or size[1])))
    if kind == "int8":
        return {"packed": (torch.int8, size), "scale": (torch.float32, (rows,))}
    scale, zero = (torch.bfloat16, torch.bfloat16) if kind == "int4" else (torch.float16, torch.uint8)
    return {"packed": (torch.uint8, (rows, math.ceil(columns / 2))), "scale": (scale, groups), "zero": (zero, groups)}


def pack_int4(codes: Tensor) -> Tensor:
    """Pack numbers 0..15 [N, K] to uint8 [N, ceil(K / 2)], the even column in the low nibble; a missing last column is 0."""
    codes = codes.to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes.new_zeros(codes.shape[0], 1)], 1)
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """uint8 [N, ceil(columns / 2)] -> numbers 0..15 [N, columns] uint8."""
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :columns]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ (Frobenius); 0 where nothing was wanted and nothing found."""
    size, off = float(wanted.float().norm()), float((found.float() - wanted.float()).norm())
    return off / size if size else off

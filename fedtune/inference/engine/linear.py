"""The engine's linear layers, in four kinds.

Every kind maps float32 rows to float32 rows. Packages store a linear as portable tensors; packing converts them to the fastest format for
this machine: that of the native kernels (`Native`) where they run, else torch's (one class for each kind), which is also the reference.

| kind | portable tensors, besides an optional `bias` [N] float32 |
|---|---|
| fp32 | `weight` [N, K] float32 |
| bf16 | `weight` [N, K] bfloat16 |
| int8 | `packed` [N, K] int8 in -127..127, `scale` [N] float32; w = packed * scale |
| int4 | `packed` [N, ceil(K/2)] uint8, `scale` and `zero` [N, ceil(K/g)] bfloat16; w = (q - 8) * scale + zero |

int4's q are 0..15, two per byte, the even column in the low half; the last group of a row may have fewer than g columns.

Rounding, relative to the exact product with the dequantized weights. Native: int8 and int4 round every 32 columns of a row of x to 255
steps between -max|x| and max|x|, and int4's scales as in `native.pack`; bf16 rounds x to 8 bits; sums are float32. torch: bf16 and int4
round x, y and (int4) w to 8 bits; int8 rounds each row of x to 255 steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fedtune.errors import ModelError
from fedtune.inference.engine.native.choice import why_torch
from fedtune.inference.engine.native.library import Kernels, kernels
from fedtune.inference.engine.native.pack import pack, weights_of

KINDS = ("fp32", "bf16", "int8", "int4")
GROUPS = (32, 64, 128, 256)  # columns per int4 scale that torch's kernel supports
DENSE = 96  # rows from which dequantized int4 is faster (60 with AMX); fixed, because results must not depend on timing
_CHUNK = 1 << 21  # weights that are unpacked at once
_TINY = torch.tensor(1e-30)  # avoids a division by zero for rows of zeros


class Linear(ABC):
    """y = x W^T + b.

    Attributes:
        kind: One of `KINDS`.
        n_in, n_out: K and N.
        group: Columns per int4 scale; 0 for other kinds.
        parts: The packed tensors from `pack`.
        mapped: The memory-mapped tensor that backs `parts`; None if they own their memory.
    """

    kind: str

    def __init__(self, parts: Mapping[str, Tensor], *, n_in: int, n_out: int, group: int = 0) -> None:
        self.parts, self.n_in, self.n_out, self.group = dict(parts), n_in, n_out, group
        self.mapped: Tensor | None = None
        self._bias = parts.get("bias")

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[n, K] float32 -> [n, N] float32, a new tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights with scales, without the bias."""
        return sum(size_of(tensor) for name, tensor in self.parts.items() if name != "bias")


class Fp32(Linear):
    """Plain float32."""

    kind = "fp32"

    def __init__(self, parts: Mapping[str, Tensor], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out)
        self._weight = parts["weight"]

    @staticmethod
    def pack(tensors: Mapping[str, Tensor], n_in: int, group: int) -> dict[str, Tensor]:
        return {**tensors, "weight": tensors["weight"].float()}

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)


class Bf16(Linear):
    """bfloat16 in oneDNN's blocked layout, float32 sums."""

    kind = "bf16"

    def __init__(self, parts: Mapping[str, Tensor], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out)
        self._packed, self._plain = parts.get("packed"), parts.get("weight")

    @staticmethod
    def pack(tensors: Mapping[str, Tensor], n_in: int, group: int) -> dict[str, Tensor]:
        out = dict(tensors)
        weight = out.pop("weight").bfloat16()
        if _packs_bf16():
            return {**out, "packed": torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)}
        return {**out, "weight": weight}

    def __call__(self, x: Tensor) -> Tensor:
        rows, x = x.shape[0], _stepped(x.bfloat16())
        if self._packed is None:
            y = linear(x, self._plain)[:rows].float()  # pyright: ignore[reportArgumentType]
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")[:rows].float()
        return y if self._bias is None else y.add_(self._bias)


class Int8(Linear):
    """8-bit weights with one scale per row, and 8-bit activations with one dynamic scale per row; sums are exact.

    The kernel takes one activation scale for all rows: it gets 1, and the rows' scales are applied to its float32 result. Activations are
    unsigned numbers around 128: oneDNN is fast for signed ones only with AMX; otherwise its reference code is 400 times slower.
    """

    kind = "int8"

    def __init__(self, parts: Mapping[str, Tensor], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out)
        self._packed, self._scale = parts["packed"], parts["scale"]
        self._zeros = torch.zeros(n_out, dtype=torch.int32)
        self._steps = 127 if _has_vnni() else 63  # without VNNI two products are summed in 16 bits and must not overflow

    @staticmethod
    def pack(tensors: Mapping[str, Tensor], n_in: int, group: int) -> dict[str, Tensor]:
        packed = torch.ops.onednn.qlinear_prepack(tensors["packed"].contiguous(), None)
        return {**tensors, "packed": packed, "scale": tensors["scale"].contiguous()}

    def __call__(self, x: Tensor) -> Tensor:
        # torch vectorizes each of these operations; a row norm takes 20 times as long, one with a broadcast constant 4 times
        step = torch.add(_TINY, x.abs().amax(-1, keepdim=True), alpha=1 / self._steps)
        codes = _stepped(torch.div(x, step).add_(self._steps + 1.5).to(torch.uint8))  # + 0.5 rounds, because the conversion truncates
        y = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, self._steps + 1, self._packed, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )[: x.shape[0]]
        return y.mul_(step) if self._bias is None else torch.addcmul(self._bias, y, step)


class Int4(Linear):
    """4-bit weights with a scale and a zero per group of a row's columns, and bfloat16 activations.

    Weights are zero-padded: rows to a multiple of 64, columns to whole groups. Few rows of x use torch's tinygemm; many (`DENSE`) use a
    bfloat16 product with weights that are dequantized in chunks.
    """

    kind = "int4"

    def __init__(self, parts: Mapping[str, Tensor], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out, group=group)
        self._packed, self._scales = parts["packed"], parts["scales"]
        self._short, self._filled = -n_in % group, -n_out % _WIDE > 0

    @staticmethod
    def pack(tensors: Mapping[str, Tensor], n_in: int, group: int) -> dict[str, Tensor]:
        scale, zero = tensors["scale"], tensors["zero"]
        n_out, groups = scale.shape
        short, rows = groups * group - n_in, -n_out % _WIDE
        packed = torch.empty(n_out + rows, (n_in + short) // 2, dtype=torch.uint8)
        step = _few(n_in)
        for at in range(0, n_out, step):  # the packer takes int32
            codes = _nibbles(tensors["packed"][at : at + step])[:, :n_in].int()
            codes = pad(codes, (0, short, 0, -codes.shape[0] % _WIDE), value=8)
            packed[at : at + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # [groups, N, 2]; padding columns of the last group are multiplied by zero activations
        scales = torch.stack([pad(t.bfloat16(), (0, 0, 0, rows)).T for t in (scale, zero)], -1).contiguous()
        return {"packed": packed, "scales": scales, **({"bias": tensors["bias"]} if "bias" in tensors else {})}

    def __call__(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if self._short:
            x = pad(x, (0, self._short))
        if x.shape[0] < DENSE or not _known_layout():
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, self.group, self._scales)
            y = (y[:, : self.n_out] if self._filled else y).float()
        else:
            y = self._dense(x)
        return y if self._bias is None else y.add_(self._bias)

    def _dense(self, x: Tensor) -> Tensor:
        rows, x = x.shape[0], _stepped(x)
        y, step = x.new_empty(rows, self.n_out, dtype=torch.float32), _few(x.shape[1])
        for at in range(0, self.n_out, step):
            y[:, at : at + step] = (x @ self._columns(at, at + step))[:rows, : self.n_out - at]
        return y

    def _columns(self, first: int, end: int) -> Tensor:
        """Rows first..end-1 of the weight, transposed: [K, end - first] bfloat16."""
        packed = _blocks(self._packed)[first // _WIDE : end // _WIDE].transpose(0, 1)  # [K, blocks, 32]
        whole = torch.empty(*packed.shape[:2], _WIDE, dtype=torch.bfloat16)
        for half, codes in enumerate((packed & 15, packed >> 4)):  # subtract while they are bytes, which is faster
            whole[..., half * _WIDE // 2 : (half + 1) * _WIDE // 2] = codes.view(torch.int8).sub_(8)
        scale, zero = (t.contiguous().unsqueeze(1) for t in self._scales[:, first:end].unbind(-1))  # [groups, 1, n]
        grouped = whole.view(scale.shape[0], self.group, -1)
        return torch.addcmul(zero, grouped, scale, out=grouped).view(packed.shape[0], -1)


class Native(Linear):
    """bf16, int8 or int4 in the layout of the native kernels.

    A row's result does not depend on the other rows of x, nor on the number of threads. In int8 and int4, a row of x with a number that is
    not finite gives NaN, and 32 columns below 1e-30 count as zeros.

    Attributes:
        kernels: The kernels, with their instruction set.
        weights: The parts as the kernels read them.
    """

    def __init__(self, kind: str, parts: Mapping[str, Tensor], run: Kernels, *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out, group=group)
        self.kind = kind
        self.kernels, self.weights = run, weights_of(self.parts, kind, n_in, n_out)

    def __call__(self, x: Tensor) -> Tensor:
        x, y = x.float().contiguous(), torch.empty(x.shape[0], self.n_out)
        if x.shape[0]:
            self.kernels.multiply(self.weights, torch.get_num_threads(), x.shape[0], (x.data_ptr(), x.nbytes), (y.data_ptr(), y.nbytes))
        return y


CLASSES = {made.kind: made for made in (Fp32, Bf16, Int8, Int4)}  # `pack` converts portable tensors to a class's parts


def linear_from_parts(kind: str, parts: Mapping[str, Tensor], *, n_in: int, n_out: int, group: int = 0) -> Linear:
    """Make a linear from packed parts, which may be mapped from disk; `packing()` must be that of their time."""
    run = kernels()
    if "codes" in parts and run is not None:
        return Native(kind, parts, run, n_in=n_in, n_out=n_out, group=group)
    return CLASSES[kind](parts, n_in=n_in, n_out=n_out, group=group)


def describe_path(linears: Iterable[Linear]) -> str:
    """One sentence: which kernels run these linears, and why it is torch's."""
    paths = dict.fromkeys(
        f"{x.kind} by native kernels ({x.kernels.instructions})" if isinstance(x, Native) else f"{x.kind} by torch ({why_torch(x.kind)})"
        for x in linears
    )
    return ", ".join(paths)


def size_of(part: Tensor) -> int:
    """Bytes of a part, plain or in oneDNN's own layout."""
    return torch.ops.mkldnn._nbytes(part) if part.is_mkldnn else part.nbytes


def linear_from_tensors(kind: str, tensors: Mapping[str, Tensor], *, n_in: int, group: int = 32, name: str = "a linear") -> Linear:
    """Pack portable tensors for this machine.

    Args:
        kind: One of `KINDS`.
        tensors: As in the table above.
        n_in: K.
        group: Columns per int4 scale; 0 for int8, which has one scale per row.
        name: The linear's name, for error sentences.

    Raises:
        ModelError: The kind or group is not supported, or the tensors do not match the kind.
    """
    parts = {"fp32": ("weight",), "bf16": ("weight",), "int8": ("packed", "scale"), "int4": ("packed", "scale", "zero")}.get(kind)
    if parts is None:
        raise ModelError(f"{name} is of kind {kind!r}: the engine supports {', '.join(KINDS)}")
    if missing := [p for p in parts if p not in tensors]:
        raise ModelError(f"{name} lacks its {missing[0]}, which {kind} needs: export the model again")
    if kind == "int4" and group not in GROUPS:
        raise ModelError(f"{name} has int4 groups of {group} columns: the engine supports {', '.join(map(str, GROUPS))}; export it again")
    n_out = tensors[parts[0]].shape[0]
    groups = math.ceil(n_in / group) if group else 0
    sizes = {
        "weight": (n_out, n_in),
        "packed": (n_out, n_in if kind == "int8" else math.ceil(n_in / 2)),
        "scale": (n_out,) if kind == "int8" else (n_out, groups),
        "zero": (n_out, groups),
        "bias": (n_out,),
    }
    for part, tensor in tensors.items():
        if tuple(tensor.shape) != sizes.get(part):
            raise ModelError(f"{name} has a {part} of shape {tuple(tensor.shape)}, {kind} needs {sizes.get(part)}: export the model again")
    if "bias" in tensors:
        tensors = {**tensors, "bias": tensors["bias"].float()}
    packed = CLASSES[kind].pack(tensors, n_in, group) if why_torch(kind) else pack(kind, tensors, n_in, group)
    return linear_from_parts(kind, packed, n_in=n_in, n_out=n_out, group=group if kind == "int4" else 0)


def portable(kind: str, weight: Tensor, *, group: int = 32) -> dict[str, Tensor]:
    """Convert a weight [N, K] of any float dtype to portable tensors; quantized kinds round to nearest."""
    if kind == "fp32":
        return {"weight": weight.float()}
    if kind == "bf16":
        return {"weight": weight.bfloat16()}
    if kind not in KINDS or (kind == "int4" and group not in GROUPS):
        raise ModelError(
            f"there is no kind {kind!r} with groups of {group}: the engine supports {', '.join(KINDS)}, int4 with groups of {GROUPS}"
        )
    parts = [_int8(w.float()) if kind == "int8" else _int4(w.float(), group) for w in weight.split(_few(weight.shape[1]))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _int8(weight: Tensor) -> dict[str, Tensor]:
    scale = _or_one(weight.abs().amax(1) / 127)
    return {"packed": (weight / scale.unsqueeze(1)).round_().to(torch.int8), "scale": scale}


def _int4(weight: Tensor, group: int) -> dict[str, Tensor]:
    n_in = weight.shape[1]
    grouped = torch.cat([weight, weight[:, -1:].expand(-1, -n_in % group)], 1).unflatten(
        1, (-1, group)
    )  # padding with copies changes no extreme
    low, high = grouped.amin(2), grouped.amax(2)
    scale = _or_one(((high - low) / 15).bfloat16().float())  # rounded before the codes are chosen, so that they compensate
    middle = torch.where(high > low, (low + high + scale) / 2, low)  # codes -8..7: the middle of the range is half a step lower
    zero = middle.bfloat16().float()
    codes = ((grouped - zero.unsqueeze(2)) / scale.unsqueeze(2)).round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)[:, :n_in]
    codes = pad(codes, (0, n_in % 2))
    return {"packed": codes[:, ::2] | codes[:, 1::2] << 4, "scale": scale.bfloat16(), "zero": zero.bfloat16()}


def _stepped(x: Tensor) -> Tensor:
    """Pad [n, K] with rows of zeros to one of few row counts.

    oneDNN compiles a kernel for each row count, which takes milliseconds and 0.4 MB, and keeps 1,024 of them.
    """
    rows = x.shape[0]
    more = 0 if rows <= 8 else -rows % (16 if rows <= 128 else 64)
    return pad(x, (0, 0, 0, more)) if more else x


def _few(n_in: int) -> int:
    """Rows per chunk, so that unpacked weights stay small relative to the packed ones."""
    return max(_WIDE, _CHUNK // n_in // _WIDE * _WIDE)


def dequantized(kind: str, tensors: Mapping[str, Tensor], *, n_in: int, group: int = 32) -> Tensor:
    """Convert portable tensors to a weight [N, K] float32."""
    if kind in ("fp32", "bf16"):
        return tensors["weight"].float()
    if kind == "int8":
        return tensors["packed"].float() * tensors["scale"].unsqueeze(1)
    scale, zero = (tensors[part].float().repeat_interleave(group, 1)[:, :n_in] for part in ("scale", "zero"))
    return (_nibbles(tensors["packed"])[:, :n_in].float() - 8) * scale + zero


def _or_one(scale: Tensor) -> Tensor:
    """Replace scale 0 (a group of equal numbers) with 1, to avoid a division by 0."""
    return torch.where(scale > 0, scale, 1.0)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, b] -> uint8 [N, 2b] of 0..15."""
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)


_WIDE = 64  # rows that torch packs together with AVX-512


def _blocks(packed: Tensor) -> Tensor:
    """[N/64, K, 32]: byte j of a block's column holds row j in its low half and row j + 32 in its high half."""
    return packed.view(torch.uint8).view(packed.shape[0] // _WIDE, -1, _WIDE // 2)


@cache
def _known_layout() -> bool:
    """Whether torch packs int4 as in `_blocks`: the layout is internal, and different without AVX-512."""
    codes = torch.randint(0, 16, (2 * _WIDE, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = _blocks(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    found = torch.cat([packed & 15, packed >> 4], -1).transpose(1, 2).reshape(codes.shape)
    return torch.equal(found.int(), codes)


@cache
def _packs_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _has_vnni() -> bool:
    return torch.cpu._is_vnni_supported()

"""The linear layers by torch's kernels: the reference of the native ones, and the fallback where these do not run.

They map tensors [n, K] to new tensors [n, N], float32. See `engine.linear` for the kinds and their rounding.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fedtune.inference.engine.bfloat16 import Array
from fedtune.inference.engine.linear import Linear, Native
from fedtune.inference.engine.reference.tensors import as_array, as_tensor

__all__ = ["CLASSES", "TorchLinear", "apply", "pack"]

DENSE = 96  # rows from which dequantized int4 is faster (60 with AMX); fixed, because results must not depend on timing
_CHUNK = 1 << 21  # weights that are unpacked at once
_WIDE = 64  # rows that torch packs together with AVX-512
_TINY = torch.tensor(1e-30)  # avoids a division by zero for rows of zeros


class TorchLinear(Linear):
    """A linear whose `parts` are tensors."""

    def __init__(self, parts: Mapping[str, Any], *, n_in: int, n_out: int, group: int = 0) -> None:
        tensors = {name: as_tensor(part) if isinstance(part, np.ndarray) else part for name, part in parts.items()}
        super().__init__(tensors, n_in=n_in, n_out=n_out, group=group)
        self._bias: Tensor | None = tensors.get("bias")

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[n, K] float32 -> [n, N] float32, a new tensor."""

    @property
    def nbytes(self) -> int:
        return sum(size_of(part) for name, part in self.parts.items() if name != "bias")


class Fp32(TorchLinear):
    """Plain float32."""

    kind = "fp32"

    def __init__(self, parts: Mapping[str, Any], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out)
        self._weight = self.parts["weight"]

    @staticmethod
    def pack(tensors: Mapping[str, Tensor], n_in: int, group: int) -> dict[str, Tensor]:
        return {**tensors, "weight": tensors["weight"].float()}

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)


class Bf16(TorchLinear):
    """bfloat16 in oneDNN's blocked layout, float32 sums."""

    kind = "bf16"

    def __init__(self, parts: Mapping[str, Any], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out)
        self._packed, self._plain = self.parts.get("packed"), self.parts.get("weight")

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


class Int8(TorchLinear):
    """8-bit weights with one scale per row, and 8-bit activations with one dynamic scale per row; sums are exact.

    The kernel takes one activation scale for all rows: it gets 1, and the rows' scales are applied to its float32 result. Activations are
    unsigned numbers around 128: oneDNN is fast for signed ones only with AMX; otherwise its reference code is 400 times slower.
    """

    kind = "int8"

    def __init__(self, parts: Mapping[str, Any], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out)
        self._packed, self._scale = self.parts["packed"], self.parts["scale"]
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


class Int4(TorchLinear):
    """4-bit weights with a scale and a zero per group of a row's columns, and bfloat16 activations.

    Weights are zero-padded: rows to a multiple of 64, columns to whole groups. Few rows of x use torch's tinygemm; many (`DENSE`) use a
    bfloat16 product with weights that are dequantized in chunks.
    """

    kind = "int4"

    def __init__(self, parts: Mapping[str, Any], *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out, group=group)
        self._packed, self._scales = self.parts["packed"], self.parts["scales"]
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


CLASSES: dict[str, Any] = {made.kind: made for made in (Fp32, Bf16, Int8, Int4)}


def pack(kind: str, tensors: Mapping[str, Array], n_in: int, group: int) -> dict[str, Tensor]:
    """Convert portable tensors to the parts of a kind's class."""
    return CLASSES[kind].pack({name: as_tensor(tensor) for name, tensor in tensors.items()}, n_in, group)


def apply(own: Linear, x: Tensor) -> Tensor:
    """[n, K] -> [n, N] by any linear, native ones too."""
    if isinstance(own, Native):
        return torch.from_numpy(own(as_array(x)))
    assert isinstance(own, TorchLinear)
    return own(x)


def size_of(part: Tensor) -> int:
    """Bytes of a part, plain or in oneDNN's own layout."""
    return torch.ops.mkldnn._nbytes(part) if part.is_mkldnn else part.nbytes


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


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, b] -> uint8 [N, 2b] of 0..15."""
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)


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

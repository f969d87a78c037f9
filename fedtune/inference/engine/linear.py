"""The engine's linear layers, in four kinds.

Every kind maps float32 rows to float32 rows. Packages store a linear as portable tensors; packing converts them to the fastest format for
this machine: that of the native kernels (`Native`) where they run, else torch's (`reference.linears`), which is also the reference.

| kind | portable tensors, besides an optional `bias` [N] float32 |
|---|---|
| fp32 | `weight` [N, K] float32 |
| bf16 | `weight` [N, K] bfloat16 |
| int8 | `packed` [N, K] int8 in -127..127, `scale` [N] float32; w = packed * scale |
| int4 | `packed` [N, ceil(K/2)] uint8, `scale` and `zero` [N, ceil(K/g)] bfloat16; w = (q - 8) * scale + zero |

bfloat16 is uint16 in numpy (see `bfloat16`). int4's q are 0..15, two per byte, the even column in the low half; the last group of a row may
have fewer than g columns.

Rounding, relative to the exact product with the dequantized weights. Native: int8 and int4 round every 32 columns of a row of x to 255
steps between -max|x| and max|x|, and int4's scales as in `native.pack`; bf16 rounds x to 8 bits; sums are float32. torch: bf16 and int4
round x, y and (int4) w to 8 bits; int8 rounds each row of x to 255 steps.
"""

from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import Array, as_float32, to_bfloat16
from fedtune.inference.engine.native.library import Kernels
from fedtune.inference.engine.native.pack import nibbles_of, weights_of
from fedtune.inference.engine.threads import threads

KINDS = ("fp32", "bf16", "int8", "int4")
GROUPS = (32, 64, 128, 256)  # columns per int4 scale that torch's kernel supports
_CHUNK = 1 << 21  # weights that are rounded at once


class Linear(ABC):
    """y = x W^T + b. `Native` computes it on arrays, the classes of `reference.linears` on torch's tensors.

    Attributes:
        kind: One of `KINDS`.
        n_in, n_out: K and N.
        group: Columns per int4 scale; 0 for other kinds.
        parts: The packed arrays, or torch's tensors.
        mapped: The memory-mapped array that backs `parts`; None if they own their memory.
    """

    kind: str

    def __init__(self, parts: Mapping[str, Any], *, n_in: int, n_out: int, group: int = 0) -> None:
        self.parts, self.n_in, self.n_out, self.group = dict(parts), n_in, n_out, group
        self.mapped: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights with scales, without the bias."""
        return sum(part.nbytes for name, part in self.parts.items() if name != "bias")


class Native(Linear):
    """Any kind in the layout of the native kernels; fp32 is plain.

    A row's result does not depend on the other rows of x, nor on the number of threads. In int8 and int4, a row of x with a number that is
    not finite gives NaN, and 32 columns below 1e-30 count as zeros.

    Attributes:
        kernels: The kernels, with their instruction set.
        weights: The parts as the kernels read them.
    """

    def __init__(self, kind: str, parts: Mapping[str, Array], run: Kernels, *, n_in: int, n_out: int, group: int = 0) -> None:
        super().__init__(parts, n_in=n_in, n_out=n_out, group=group)
        self.kind = kind
        self.kernels, self.weights = run, weights_of(self.parts, kind, n_in, n_out)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, K] -> [n, N], a new array."""
        x, y = np.ascontiguousarray(x, np.float32), np.empty((len(x), self.n_out), np.float32)
        if len(x):
            self.kernels.multiply(self.weights, threads(), len(x), (x.ctypes.data, x.nbytes), (y.ctypes.data, y.nbytes))
        return y


def portable(kind: str, weight: Array, *, group: int = 32) -> dict[str, Array]:
    """Convert a weight [N, K] of any float dtype to portable tensors; quantized kinds round to nearest."""
    if kind == "fp32":
        return {"weight": as_float32(weight)}
    if kind == "bf16":
        return {"weight": weight if weight.dtype == np.uint16 else to_bfloat16(as_float32(weight))}
    if kind not in KINDS or (kind == "int4" and group not in GROUPS):
        raise ModelError(
            f"there is no kind {kind!r} with groups of {group}: the engine supports {', '.join(KINDS)}, int4 with groups of {GROUPS}"
        )
    step = max(64, _CHUNK // weight.shape[1])
    rounded: Callable[[NDArray[np.float32]], dict[str, Array]] = _int8 if kind == "int8" else lambda rows: _int4(rows, group)
    parts = [rounded(as_float32(weight[at : at + step])) for at in range(0, len(weight), step)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _int8(weight: NDArray[np.float32]) -> dict[str, Array]:
    scale = _or_one(np.abs(weight).max(1) / np.float32(127))
    return {"packed": np.rint(weight / scale[:, None]).astype(np.int8), "scale": scale}


def _int4(weight: NDArray[np.float32], group: int) -> dict[str, Array]:
    rows, n_in = weight.shape
    short = -n_in % group
    grouped = np.pad(weight, ((0, 0), (0, short)), mode="edge").reshape(rows, -1, group)  # padding with copies changes no extreme
    low, high = grouped.min(2), grouped.max(2)
    scale = _or_one(as_float32(to_bfloat16((high - low) / np.float32(15))))  # rounded before the codes are chosen, so that they compensate
    middle = np.where(high > low, (low + high + scale) / np.float32(2), low)  # codes -8..7: the middle of the range is half a step lower
    zero = as_float32(to_bfloat16(middle))
    codes = np.rint((grouped - zero[:, :, None]) / scale[:, :, None]).astype(np.int32) + 8
    codes = np.pad(codes.clip(0, 15).astype(np.uint8).reshape(rows, -1)[:, :n_in], ((0, 0), (0, n_in % 2)))
    return {"packed": codes[:, ::2] | codes[:, 1::2] << 4, "scale": to_bfloat16(scale), "zero": to_bfloat16(zero)}


def dequantized(kind: str, tensors: Mapping[str, Array], *, n_in: int, group: int = 32) -> NDArray[np.float32]:
    """Convert portable tensors to a weight [N, K]."""
    if kind in ("fp32", "bf16"):
        return as_float32(tensors["weight"])
    if kind == "int8":
        return tensors["packed"].astype(np.float32) * as_float32(tensors["scale"])[:, None]
    scale, zero = (np.repeat(as_float32(tensors[part]), group, 1)[:, :n_in] for part in ("scale", "zero"))
    return (nibbles_of(tensors["packed"], n_in).astype(np.float32) - 8) * scale + zero


def _or_one(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace scale 0 (a group of equal numbers) with 1, to avoid a division by 0."""
    return np.where(scale > 0, scale, np.float32(1))

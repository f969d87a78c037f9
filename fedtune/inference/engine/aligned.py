"""Arrays for native code, which start at a cache line: vector loads that cross lines make decoding up to a fifth slower."""

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fedtune.inference.engine.bfloat16 import Array

__all__ = ["ALIGNED", "aligned", "zeros"]

ALIGNED = 64  # bytes of a cache line


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """`np.zeros`, aligned."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def aligned(array: Array) -> Array:
    """The array itself if it is contiguous and aligned, else a copy."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNED == 0:
        return array
    out = zeros(array.shape, array.dtype)
    out[...] = array
    return out

"""bfloat16 in numpy, which lacks it: arrays of uint16 hold the upper halves of float32 numbers. The engine has no other uint16 arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "DTYPES", "as_float32", "to_bfloat16", "to_dtype"]

Array = NDArray[Any]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}  # of a cache's entries


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def as_float32(x: Array) -> NDArray[np.float32]:
    """Convert float32, bfloat16 or float16; float32 is returned as it is."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def to_dtype(x: NDArray[np.float32], dtype: np.dtype[Any]) -> Array:
    """Convert float32 to one of `DTYPES`."""
    return to_bfloat16(x) if dtype == np.uint16 else x

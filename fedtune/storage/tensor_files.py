"""Reads the headers of safetensors files, and maps their tensors into memory as numpy arrays.

The safetensors library checks a header, but says neither where a tensor's bytes are nor, for numpy, what a bfloat16 is.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fedtune.errors import ModelError
from fedtune.storage.parsing import parse_json, regular

__all__ = ["DTYPES", "StoredTensor", "read_header"]

_CODES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I8": "i1", "U8": "u1"}
DTYPES = {name: np.dtype(code) for name, code in _CODES.items()}
_HEADER = 1 << 25  # limit in bytes, far above real headers: parsing takes several times as much memory


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `dtype` is the file's name for it; `start` and `size` are in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def read(self) -> np.ndarray[Any, Any]:
        """Map the tensor; its pages are freed with the array, which may be changed without an effect on the file.

        Raises:
            ModelError: The file has shrunk, or numpy cannot represent the shape, or the engine the dtype.
        """
        if self.dtype not in DTYPES:
            raise ModelError(f"{self.file} holds {self.dtype} numbers, which the engine cannot read: export the model again")
        dtype = DTYPES[self.dtype]
        page = self.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            if not (count := math.prod(self.shape)):
                return np.empty(self.shape, dtype)
            with open(self.file, "rb") as file:
                memory = mmap.mmap(file.fileno(), dtype.itemsize * count + self.start - page, access=mmap.ACCESS_COPY, offset=page)
            return np.frombuffer(memory, dtype, count, self.start - page).reshape(self.shape)
        except (OSError, ValueError, OverflowError) as bad:  # numpy refuses shapes that the format allows
            raise ModelError(f"{self.file} cannot be read ({str(bad)[:80]}): it is damaged") from None


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        ModelError: The file is missing, truncated or damaged.
    """
    try:
        size = regular(path).st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _HEADER):
                raise ValueError(f"it declares a header of {length} bytes")
            header: dict[str, Any] = parse_json(file.read(length).decode())
        metadata = header.pop("__metadata__", None) or {}
        found = {
            name: StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + begin, end - begin)
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        }
        if size != (end := max((t.start + t.size for t in found.values()), default=8 + length)):
            raise ValueError(f"it has {size} bytes, its header describes {end}")
        with safe_open(path, "np"):  # it checks sizes, shapes and dtypes
            pass
    except (SafetensorError, OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as bad:
        reason = getattr(bad, "strerror", None) or str(bad).splitlines()[0][:80] if str(bad) else "too large"
        raise ModelError(f"{path} is not a valid safetensors file ({reason}): download or export it again") from None
    return found, {str(k): str(v) for k, v in metadata.items()}

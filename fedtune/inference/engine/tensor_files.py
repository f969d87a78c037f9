"""Reads safetensors files as memory-mapped arrays. The safetensors library checks them, but has no bfloat16 for numpy."""

import math
import mmap
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import Array
from fedtune.storage.parsing import parse_json

__all__ = ["DTYPES", "StoredTensor", "read_header"]

_CODES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I8": "i1", "U8": "u1"}
DTYPES = {name: np.dtype(code) for name, code in _CODES.items()}
_HEADER = 1 << 25  # limit in bytes, far above real headers: parsing takes several times as much memory


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: its dtype as the file names it, its shape, and where it begins."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def read(self) -> Array:
        """Map the tensor; its pages are freed with the array, which may be changed without an effect on the file.

        Raises:
            ModelError: The file has shrunk, numpy has no such shape, or the engine no such dtype.
        """
        if self.dtype not in DTYPES:
            raise ModelError(f"{self.path} holds {self.dtype} numbers, which the engine cannot read: export the model again")
        dtype = DTYPES[self.dtype]
        start = self.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            if not (count := math.prod(self.shape)):
                return np.empty(self.shape, dtype)
            with open(self.path, "rb") as file:
                memory = mmap.mmap(file.fileno(), dtype.itemsize * count + self.begin - start, access=mmap.ACCESS_COPY, offset=start)
            return np.frombuffer(memory, dtype, count, self.begin - start).reshape(self.shape)
        except (OSError, ValueError, OverflowError) as bad:  # numpy refuses shapes that the format allows
            raise ModelError(f"{self.path} cannot be read ({str(bad)[:80]}): it is damaged") from None


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        ModelError: The file is missing or damaged.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER:
                raise ModelError(f"{path} declares a header of {length} bytes: it is damaged")
            header: dict[str, Any] = parse_json(file.read(length).decode())
        with safe_open(path, "np") as checked:  # sizes, offsets and the file's length
            names = set(checked.keys())
        metadata = header.pop("__metadata__", None) or {}
        found = {
            name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name in names
        }
    except (SafetensorError, OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as bad:
        reason = getattr(bad, "strerror", None) or str(bad).splitlines()[0][:80] if str(bad) else "too large"
        raise ModelError(f"{path} is not a valid safetensors file ({reason}): export the model again") from None
    return found, {str(k): str(v) for k, v in metadata.items()}

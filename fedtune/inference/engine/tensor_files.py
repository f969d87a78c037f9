"""Reads safetensors files as memory-mapped arrays. The safetensors library checks them, but has no bfloat16 for numpy."""

import math
import mmap
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
            ModelError: The file has shrunk, or the dtype is unknown.
        """
        if self.dtype not in DTYPES:
            raise ModelError(f"{self.path} holds {self.dtype} numbers, which the engine cannot read: export the model again")
        dtype = DTYPES[self.dtype]
        size = dtype.itemsize * math.prod(self.shape)
        if not size:
            return np.empty(self.shape, dtype)
        start = self.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.path, "rb") as file:
                memory = mmap.mmap(file.fileno(), size + self.begin - start, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as bad:
            raise ModelError(f"{self.path} cannot be read ({str(bad)[:80]}): it is damaged") from None
        return np.frombuffer(memory, dtype, math.prod(self.shape), self.begin - start).reshape(self.shape)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises:
        ModelError: The file is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER:
                raise ModelError(f"{path} declares a header of {length} bytes: it is damaged")
            header: dict[str, Any] = parse_json(file.read(length).decode())
        with safe_open(path, "np") as checked:  # sizes, offsets and the file's length
            names = set(checked.keys())
        metadata = header.pop("__metadata__", {})
        found = {
            name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name in names
        }
    except (SafetensorError, OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as bad:
        reason = getattr(bad, "strerror", None) or str(bad).splitlines()[0][:80] if str(bad) else "too large"
        raise ModelError(f"{path} is not a valid safetensors file ({reason}): export the model again") from None
    return found, {str(k): str(v) for k, v in metadata.items()}

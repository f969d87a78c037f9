"""One tensor of a merged model: reads blocks of rows from the checkpoint and applies the adapter's edits.

The PEFT method's file in `fedtune.models.methods` has the arithmetic. Sums are computed in float64 and rounded once, directly to the
requested dtype.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.package_writer import as_bytes
from fedtune.models.methods import Edit
from fedtune.storage.tensor_files import StoredTensor

__all__ = ["DTYPES", "MergedTensor"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors spells them
_BLOCK = 1 << 18  # entries per block that is computed in float64


class MergedTensor:
    """One tensor of the merged model.

    Args:
        kept: Its location in the checkpoint, or the tensor itself.
        edits: Edits by the adapter and the shifts, in order.
        transposed: It is stored as (in, out), like GPT-2's linear layers, so the edits' rows are its columns.
    """

    def __init__(self, kept: StoredTensor | Tensor, edits: Sequence[Edit] = (), transposed: bool = False) -> None:
        self._kept, self._edits = kept, tuple(edits)
        self._transposed = transposed and bool(edits)
        self.shape = tuple(kept.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return all merged values as a new tensor."""
        return self._columns(dtype) if self._transposed else self.rows(0, self.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return rows `first` to `last` of the merged values (entries, if it is a vector)."""
        assert not self._transposed
        out = torch.empty(last - first, *self.shape[1:], dtype=dtype)
        step = max(_BLOCK // math.prod(self.shape[1:]), 1)
        for a in range(first, last, step):
            b = min(a + step, last)
            out[a - first : b - first] = self._edited(self._plain(a, b), a, b)
        return out

    def _columns(self, dtype: torch.dtype) -> Tensor:
        whole = self._plain(0, self.shape[0])
        out = whole if whole.dtype == dtype and whole is not self._kept else torch.empty(self.shape, dtype=dtype)
        step = max(_BLOCK // self.shape[0], 1)
        for a in range(0, self.shape[1], step):
            b = min(a + step, self.shape[1])
            out[:, a:b] = self._edited(whole[:, a:b].T, a, b).T
        return out

    def _edited(self, part: Tensor, first: int, last: int) -> Tensor:
        if self._edits:
            part = part.double()
            for edit in self._edits:
                part = edit(part, first, last)
        return part

    def _plain(self, first: int, last: int) -> Tensor:
        """Return unmerged rows. They are read, not memory-mapped: mapped pages would count as memory too."""
        if isinstance(self._kept, Tensor):
            return self._kept if (first, last) == (0, self.shape[0]) else self._kept[first:last]
        stored = self._kept
        out = torch.empty(last - first, *stored.shape[1:], dtype=DTYPES[stored.dtype])
        with open(stored.file, "rb", buffering=0) as f:
            f.seek(stored.start + first * (stored.size // stored.shape[0]))
            view = as_bytes(out)
            while view and (got := f.readinto(view)):
                view = view[got:]
        if view:
            raise ModelError(f"{stored.file} ends within '{stored.name}': it is truncated, download it again")
        return out

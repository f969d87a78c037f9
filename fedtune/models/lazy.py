"""Read a checkpoint's tensors one at a time, so that quantization never needs memory for the full-precision model."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fedtune.models.checkpoint import stored_tensors
from fedtune.storage.tensor_files import StoredTensor

__all__ = ["LazyTensor", "lazy_tensors"]

_STRETCH = 1 << 22  # entries to read at once when the dtype changes
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class LazyTensor:
    """A tensor that is read from its file when it is indexed with `...`. It is not memory-mapped, because mapped pages count as memory too.

    Args:
        stored: Its location in a file.
        dtype: Dtype of the result, converted chunk by chunk; None keeps the stored dtype.
    """

    def __init__(self, stored: StoredTensor, dtype: torch.dtype | None = None) -> None:
        self.stored, self.dtype = stored, dtype
        self.shape = stored.shape

    def __getitem__(self, index: Any) -> Tensor:
        """The whole tensor, for any index."""
        kept = getattr(torch, _DTYPES[self.stored.dtype])
        flat = torch.empty(math.prod(self.shape), dtype=self.dtype or kept)
        step = flat.numel() if self.dtype in (None, kept) else _STRETCH
        with open(self.stored.file, "rb", buffering=0) as f:
            f.seek(self.stored.start)
            for part in flat.split(max(step, 1)):
                raw = part if part.dtype == kept else torch.empty(part.shape, dtype=kept)
                view = memoryview(cast(Any, raw.view(torch.uint8).numpy()))
                while view and (got := f.readinto(view)):
                    view = view[got:]
                if view:
                    raise OSError(f"{self.stored.file} ends within '{self.stored.name}'")
                if raw is not part:
                    part.copy_(raw)
        return flat.view(self.shape)


def lazy_tensors(folder: Path, dtype: torch.dtype, early: Collection[str] = ()) -> dict[str, LazyTensor]:
    """The checkpoint's tensors, each read when it is needed.

    Args:
        folder: The checkpoint.
        dtype: Dtype of the floating-point tensors in `early`.
        early: Name suffixes, such as `embed_tokens.weight`.
    """
    return {
        t.name: LazyTensor(t, dtype if t.dtype in ("F64", "F32", "F16", "BF16") and t.name.endswith(tuple(early)) else None)
        for t in stored_tensors(folder)
    }

"""The table of token embeddings, of which a pass reads a few rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.bfloat16 import Array, as_float32

__all__ = ["Embedding"]

_KINDS = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2, np.dtype(np.int8): 3}  # of struct fedtune_draft


@dataclass(frozen=True)
class Embedding:
    """A table.

    Args:
        table: [V, d] float32, bfloat16, float16 or int8.
        scale: [V] float32, the factor of each row; int8 only.
    """

    table: Array
    scale: NDArray[np.float32] | None = None

    def rows(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """[n] token ids → [n, d], a new array."""
        found = self.table[ids]
        return as_float32(found) if self.scale is None else found.astype(np.float32) * self.scale[ids][:, None]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def kind(self) -> int:
        """How native code reads the table."""
        return _KINDS[self.table.dtype]

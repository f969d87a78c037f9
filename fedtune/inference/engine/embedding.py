"""The table of token embeddings, of which a pass reads a few rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.bfloat16 import Array, as_float32

__all__ = ["Embedding"]

_KINDS = {np.dtype(np.float32): 0, np.dtype(np.uint16): 1, np.dtype(np.float16): 2}  # of struct fedtune_draft


@dataclass(frozen=True)
class Embedding:
    """A table.

    Args:
        table: [V, d] float32, bfloat16 or float16.
    """

    table: Array

    def rows(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """[n] token ids → [n, d], a new array."""
        return as_float32(self.table[ids])

    def __len__(self) -> int:
        return len(self.table)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    @property
    def kind(self) -> int:
        """How native code reads the table."""
        return _KINDS[self.table.dtype]

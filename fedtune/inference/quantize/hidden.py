"""Hidden states of a text on the disk, so that memory holds those of one pass and not of the whole text."""

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.package_writer import as_bytes

__all__ = ["Hidden"]


class Hidden(Sequence[Tensor]):
    """Hidden states [n, d] of some sequences, float32, in a file without a name, which is gone with this object.

    Args:
        lengths: n of each.
        width: d.
        folder: Where the file lies; None: among the system's temporary files, which may be memory themselves.
    """

    def __init__(self, lengths: Sequence[int], width: int, folder: Path | None = None) -> None:
        self.starts, self.width = [0, *accumulate(lengths)], width
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  held as long as this is
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """A sequence's states, in memory of their own."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self.rows(self.starts[i], self.starts[i + 1])

    def rows(self, first: int, last: int) -> Tensor:
        """Rows of all sequences, one after the other."""
        out = torch.empty(last - first, self.width)
        view, at = as_bytes(out), 4 * first * self.width
        while view and (got := os.preadv(self._file.fileno(), [view], at)):
            view, at = view[got:], at + got
        if view:
            raise ModelError(f"the temporary file of hidden states ends before row {last}: see the disk")
        return out

    def put(self, first: int, rows: Tensor) -> None:
        """Write rows [n, d] from row `first` on."""
        view, at = as_bytes(rows), 4 * first * self.width
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done

    def batches(self, most: int) -> Iterator[tuple[int, list[int]]]:
        """First row and lengths of sequences that have at most so many rows together, or of a longer one alone."""
        first, lengths = 0, list[int]()
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            if lengths and end - first > most:
                yield first, lengths
                first, lengths = start, []
            lengths.append(end - start)
        if lengths:
            yield first, lengths

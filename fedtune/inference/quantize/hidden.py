"""Hidden states of a text on disk, so that memory holds only those of one pass."""

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
    """Hidden states [n, d] of several sequences, float32, in an unnamed file that is deleted with this object.

    Args:
        lengths: n of each sequence.
        width: d.
        folder: Folder of the file; None uses the system's temporary folder, which may be in memory.
    """

    def __init__(self, lengths: Sequence[int], width: int, folder: Path | None = None) -> None:
        self.starts, self.width = [0, *accumulate(lengths)], width
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  open as long as this object exists
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """Return a sequence's states as a new tensor."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self.rows(self.starts[i], self.starts[i + 1])

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows of the concatenated sequences."""
        out = torch.empty(last - first, self.width)
        view, at = as_bytes(out), 4 * first * self.width
        while view and (got := os.preadv(self._file.fileno(), [view], at)):
            view, at = view[got:], at + got
        if view:
            raise ModelError(f"the temporary file of hidden states ends before row {last}: check the disk space")
        return out

    def put(self, first: int, rows: Tensor) -> None:
        """Write rows [n, d] from row `first` on."""
        view, at = as_bytes(rows), 4 * first * self.width
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            view, at = view[done:], at + done

    def batches(self, most: int) -> Iterator[tuple[int, list[int]]]:
        """Yield the first row and the lengths of batches of sequences with at most `most` rows in total; a longer sequence is a batch of
        its own."""
        first, lengths = 0, list[int]()
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            if lengths and end - first > most:
                yield first, lengths
                first, lengths = start, []
            lengths.append(end - start)
        if lengths:
            yield first, lengths

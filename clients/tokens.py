"""Encoded rows in a memory-mapped file: even with a thousand clients, a process holds only the training client's rows in memory."""

import mmap
import tempfile
import weakref
from collections.abc import Sequence
from typing import overload

import numpy as np

from fedtune.data import Example

_FIRST = 1 << 20  # initial bytes; a full file doubles, and unwritten parts use no disk space
_COLUMNS = 9  # a row's entry: offset and length of its ids, labels and answer; prompt length and `first` in tokens; dtype of its labels
_LABELS = (np.int32, np.float32)


class Spill:
    """An unnamed temporary file. It is deleted even if the process crashes, because clients' rows are private."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="fedtune-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._end = 0
        self._grow(_FIRST)

    def array(self, at: int, count: int, dtype: type) -> np.ndarray:
        """(count,) read-only view of the file."""
        out = np.frombuffer(self._map, dtype, count, at)
        out.flags.writeable = False
        return out

    def write(self, data: bytes) -> int:
        """Append `data` and return its offset."""
        at = self._end
        if at + len(data) > len(self._map):
            self._grow(2 * (at + len(data)))
        self._map[at : at + len(data)] = data
        self._end = -(-(at + len(data)) // 8) * 8  # arrays are aligned to 8 bytes
        return at

    def _grow(self, size: int) -> None:
        self._file.truncate(size)
        self._map = mmap.mmap(self._file.fileno(), size)  # views of the old map stay valid


class TokenStore(Spill):
    """A file of encoded rows, without their `reference`."""

    def add(self, examples: Sequence[Example]) -> "Rows":
        """Write examples, and return a view of them."""
        entries = np.zeros((len(examples), _COLUMNS), np.int64)
        for entry, e in zip(entries, examples, strict=True):
            answer = e.answer.encode()
            ids, labels = self.write(e.input_ids.astype(np.int32).tobytes()), -1
            if e.labels is not e.input_ids:  # in causal LM both are the same array
                labels = self.write(e.labels.tobytes())
            kind = _LABELS.index(e.labels.dtype.type)
            entry[:] = ids, len(e.input_ids), labels, len(e.labels), self.write(answer), len(answer), e.prompt_length, e.first, kind
        return Rows(self, self.write(entries.tobytes()), len(examples))


class Rows(Sequence[Example]):
    """A sequence of stored examples, built on access."""

    __slots__ = ("_at", "_count", "_store")

    def __init__(self, store: TokenStore, at: int, count: int) -> None:
        self._store, self._at, self._count = store, at, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        entry = self._store.array(self._at + 8 * _COLUMNS * (index % self._count), _COLUMNS, np.int64)
        ids_at, ids, labels_at, labels, answer_at, answer, prompt, first, kind = entry.tolist()
        tokens = self._store.array(ids_at, ids, np.int32)
        wanted = tokens if labels_at < 0 else self._store.array(labels_at, labels, _LABELS[kind])
        return Example(tokens, wanted, prompt, self._store.array(answer_at, answer, np.uint8).tobytes().decode(), first)

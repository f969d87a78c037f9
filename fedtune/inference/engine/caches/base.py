"""The interface between decoder and caches; `decoder` describes a pass."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import FedtuneError
from fedtune.inference.engine.bfloat16 import DTYPES, Array
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape


class CacheError(FedtuneError):
    """A cache is full, or cannot perform an operation."""


@dataclass(slots=True)
class Span:
    """One sequence's share of a pass.

    Args:
        cache: The sequence's keys and values so far.
        n: Its tokens in this pass; rows are in the order of the spans.
        keep: Number of last rows whose logits are returned; None returns all.
        adapter: Name of a separate LoRA adapter for these rows; None is the model itself.
        forks: If not empty, the last rows are forks, other tokens for places of the rows before: for each fork, the row that it follows. A
            fork sees the rows up to that one, and itself. Needs native code and a cache that is `in_order`.
    """

    cache: "Cache"
    n: int
    keep: int | None = 1
    adapter: str | None = None
    forks: Sequence[int] = ()


class Cache(ABC):
    """Keys and values of ONE sequence in all layers.

    A pass calls `prepare`, then for each layer stores the rows' keys and values and attends (native code with `native_span`, or
    `reference.attention` with `write`), then `advance`.

    Attributes:
        length: Tokens so far: the absolute position of the next one.
        limit: Maximum number of tokens.
        undo: Number of tokens that `crop` can always remove; None: all.
        dtype: Dtype of entries that are not quantized: float32 or bfloat16.
        in_order: Whether token t always lies in slot t: then native code can draft several tokens in one call, and verify forks.
    """

    in_order = False
    undo: int | None = None

    def __init__(self, shape: Shape, limit: int, dtype: str = "float32") -> None:
        if limit < 1:
            raise CacheError(f"a cache's limit must be at least 1 token, not {limit}")
        self.shape = shape
        self.limit = limit
        self.dtype = DTYPES[dtype]
        self.length = 0

    def most(self, n: int) -> int:
        """Number of the next n tokens that one pass can take; a longer text needs several passes."""
        return n

    @abstractmethod
    def prepare(self, n: int) -> None:
        """Reserve room for n more tokens.

        Raises:
            CacheError: They exceed the limit.
        """

    @abstractmethod
    def native_span(self, n: int) -> SpanStructure:
        """Describe where native code stores and reads the keys and values of a prepared pass; valid until the cache changes."""

    @abstractmethod
    def write(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32], rope: Rope) -> None:
        """Store keys, not yet rotated, and values [n, Hkv, D] of a prepared pass."""

    def advance(self, n: int) -> None:
        """Add the n stored tokens to the length. The decoder calls it once per span after the last layer."""
        self.length += n

    def can_crop_to(self, length: int) -> bool:
        """Whether `crop(length)` is possible."""
        return 0 <= length <= self.length

    def crop(self, length: int) -> None:
        """Remove the tokens from position `length` on.

        Raises:
            CacheError: The cache no longer has the needed entries.
        """
        if not self.can_crop_to(length):
            raise CacheError(f"the cache holds {self.length} tokens and cannot be cropped to {length}: start the sequence again")
        self.length = length

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held now."""

    def require_capacity(self, n: int) -> None:
        """Raise CacheError if n more tokens exceed the limit."""
        if self.length + n > self.limit:
            raise CacheError(f"{self.length} + {n} tokens exceed the cache's limit of {self.limit}: shorten the text or raise the limit")

    @staticmethod
    def prepare_all(spans: Sequence[Span]) -> None:
        """`prepare` the caches of a pass, which are all of this class and within their limits.

        Raises:
            CacheError: There is no room; nothing has changed.
        """
        for span in spans:
            span.cache.prepare(span.n)


def addresses(arrays: Iterable[Array]) -> Any:
    """A list of the arrays' addresses for native code."""
    found = [a.ctypes.data for a in arrays]
    return (ctypes.c_void_p * len(found))(*found)

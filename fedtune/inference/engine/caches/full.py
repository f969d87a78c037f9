"""The full cache: rotated keys and values of all tokens, in buffers that double on demand."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.aligned import zeros
from fedtune.inference.engine.bfloat16 import Array, to_dtype
from fedtune.inference.engine.caches.base import Cache, addresses
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape

FIRST = 64  # tokens of the first buffers


class FullCache(Cache):
    """Exact attention over all tokens; `crop` is free.

    Args:
        limit: Maximum number of tokens.
        dtype: float32, or bfloat16 for half the memory and bandwidth.

    Attributes:
        keys, values: Per layer: [Hkv, room, D].
    """

    in_order = True

    def __init__(self, shape: Shape, limit: int, dtype: str = "float32") -> None:
        super().__init__(shape, limit, dtype)
        self.keys: list[Array] = []
        self.values: list[Array] = []
        self._addresses: list[Any] = []  # of the keys and of the values

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values))

    def prepare(self, n: int) -> None:
        self.require_capacity(n)
        if not self.keys or self.keys[0].shape[1] < self.length + n:
            self._grow(self.length + n)

    def native_span(self, n: int) -> SpanStructure:
        heads, room, width = self.keys[0].shape
        keys, values = map(ctypes.addressof, self._addresses)
        return SpanStructure(
            rows=n, length=self.length, keys=keys, values=values, entries=heads * room * width, token_stride=width,
            head_stride=room * width, halves=self.dtype == np.uint16,
        )  # fmt: skip

    def write(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32], rope: Rope) -> None:
        rows = slice(self.length, self.length + len(k))
        self.keys[layer][:, rows] = to_dtype(rope.rotate(k, self.length), self.dtype).swapaxes(0, 1)
        self.values[layer][:, rows] = to_dtype(v, self.dtype).swapaxes(0, 1)

    def _grow(self, needed: int) -> None:
        shape, held = self.shape, self.keys[0].shape[1] if self.keys else 0
        size = min(self.limit, max(FIRST, 2 * held, needed))
        grown = tuple([zeros((shape.kv_heads, size, shape.head_dim), self.dtype) for _ in range(shape.layers)] for _ in range(2))
        for new, old in zip(grown, (self.keys, self.values), strict=True):
            for own, before in zip(new, old, strict=False):
                own[:, :held] = before  # including cropped entries, from which an early exit is continued
        self._addresses = [addresses(buffers) for buffers in grown]
        self.keys, self.values = grown  # together: without memory for all, the cache stays as it was

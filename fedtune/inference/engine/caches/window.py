"""Keeps the first and the newest tokens: bounded memory for endless texts.

Models put much attention on their first tokens, whatever these are. A window that drops them breaks down; one that keeps a few (sinks) does
not. Keys are cached before RoPE, and positions are relative to the cache: with s sinks and a window of w, the query at p has position
min(p, s + w - 1), the sinks 0..s-1, and the window's tokens come directly before the query. So positions stay in the trained range, and a
text may be longer than the context. Without sinks this is the plain sliding window, because scores depend only on position differences.

Source: Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453, section 3.2.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.aligned import zeros
from fedtune.inference.engine.bfloat16 import DTYPES, Array, to_dtype
from fedtune.inference.engine.caches.base import Cache, CacheError, addresses
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape


class WindowCache(Cache):
    """Sinks and a ring buffer of the newest tokens.

    Args:
        limit: Maximum tokens of the text; memory does not grow with it.
        window: Newest tokens that a query sees, including itself.
        sinks: First tokens, which every query sees.
        undo: Number of tokens that `crop` can always remove; also the most rows of a pass that overwrites others.
        dtype: Dtype of the entries: float32 or bfloat16.

    Attributes:
        keys, values: Per layer: [slots, Hkv, D], keys not rotated.

    Raises:
        CacheError: The numbers exclude each other, or do not fit the model's own sliding window.
    """

    undo: int

    def __init__(self, shape: Shape, limit: int, window: int, sinks: int = 4, *, undo: int = 32, dtype: str = "float32") -> None:
        super().__init__(shape, limit, dtype)
        if window < 1 or sinks < 0 or undo < 1:
            raise CacheError(f"window={window} and undo={undo} must be at least 1 and sinks={sinks} at least 0")
        own = min((w for w in shape.windows if w is not None), default=None)
        if own is not None and sinks >= own:
            raise CacheError(f"{sinks} sinks fill the model's own sliding window of {own} tokens: use fewer")
        self.window, self.sinks, self.undo = window, sinks, undo
        self._slots = _slots(limit, window, sinks, undo)
        self._ring = self._slots - min(sinks, self._slots)
        self._written = 0  # greatest length so far: older tokens than the ring holds are gone
        self.keys: list[Array] = []
        self.values: list[Array] = []
        self._addresses: list[Any] = []  # of the keys and of the values, per layer

    @staticmethod
    def bytes_for(shape: Shape, tokens: int, window: int, sinks: int = 4, *, undo: int = 32, dtype: str = "float32") -> int:
        """Bytes of a cache for `tokens` tokens."""
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * DTYPES[dtype].itemsize * _slots(tokens, window, sinks, undo)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.keys, *self.values))

    def advance(self, n: int) -> None:
        super().advance(n)
        self._written = max(self._written, self.length)

    def can_crop_to(self, length: int) -> bool:
        """True within `undo` tokens of the cache's greatest length, or while nothing has been overwritten."""
        return super().can_crop_to(length) and (self._written <= self._slots or length >= self._written - self.undo)

    def crop(self, length: int) -> None:
        if super().can_crop_to(length) and not self.can_crop_to(length):
            raise CacheError(
                f"the cache's window has moved on: its {self.length} tokens cannot be cropped to {length}, only by {self.undo} "
                "(start the sequence again, or raise undo)"
            )
        super().crop(length)

    def most(self, n: int) -> int:
        """A pass must not overwrite entries that one of its rows needs."""
        return min(n, max(self.undo, self._slots - self.length))

    def prepare(self, n: int) -> None:
        self.require_capacity(n)
        if not self.keys:
            size = self._slots, self.shape.kv_heads, self.shape.head_dim
            self.keys, self.values = ([zeros(size, self.dtype) for _ in range(self.shape.layers)] for _ in range(2))
            self._addresses = [addresses(self.keys), addresses(self.values)]

    def native_span(self, n: int) -> SpanStructure:
        slots, heads, width = self.keys[0].shape
        keys, values = map(ctypes.addressof, self._addresses)
        return SpanStructure(
            rows=n, length=self.length, keys=keys, values=values, entries=slots * heads * width, token_stride=heads * width,
            head_stride=width, halves=self.dtype == np.uint16, window=self.window, sinks=self.sinks, ring=max(1, self._ring),
        )  # fmt: skip

    def write(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32], rope: Rope) -> None:
        at = np.arange(self.length, self.length + len(k))
        slots = np.where(at < self.sinks, at, self.sinks + (at - self.sinks) % max(1, self._ring))
        self.keys[layer][slots], self.values[layer][slots] = to_dtype(k, self.dtype), to_dtype(v, self.dtype)

    def held(self, n: int) -> NDArray[np.int64]:
        """[filled slots]: the position of each slot's token after n more are stored."""
        end = self.length + n
        slot = np.arange(min(end, self._slots))
        ring = max(1, self._ring)
        return np.where(slot < self.sinks, slot, slot + (end - 1 - slot) // ring * ring)


def _slots(limit: int, window: int, sinks: int, undo: int) -> int:
    """Tokens that are kept: sinks, a window, and what `crop` may need again."""
    return min(limit, sinks + window - 1 + undo)

"""The full cache: rotated keys and values of all tokens, in buffers that double on demand."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedtune.inference.engine.caches.base import Cache, Span, addresses, attention, causal_mask
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope, as_complex, as_real
from fedtune.inference.engine.shape import Shape

FIRST = 64  # tokens of the first buffers


class FullCache(Cache):
    """Exact attention over all tokens; `crop` is free.

    Args:
        limit: Maximum number of tokens.
        dtype: float32, or bfloat16 for half the memory and bandwidth.
    """

    def __init__(self, shape: Shape, limit: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(shape, limit)
        self.dtype = dtype
        self._keys: list[Tensor] = []  # per layer: [Hkv, room, D]
        self._values: list[Tensor] = []
        self._by_token: tuple[list[Tensor], ...] = [], []
        self._turned: list[Tensor] = []
        self._mask: tuple[tuple[int, int, int | None], Tensor] | None = None
        self._addresses: list[Any] = []  # of the keys and of the values, per layer

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._keys, *self._values))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        n, start = q.shape[0], self.length
        end = start + n
        if not self._keys or self._keys[0].shape[1] < end:
            self._grow(end)
        rows, plain = rope.rows(start, n), self.dtype == torch.float32
        if plain:  # write the product directly into the buffer
            torch.mul(as_complex(k), rows, out=self._turned[layer].narrow(0, start, n))
        else:
            self._by_token[0][layer].narrow(0, start, n).copy_(rope.rotate(k, start))
        self._by_token[1][layer].narrow(0, start, n).copy_(v)
        q = as_real(as_complex(q) * rows)
        window = self.shape.windows[layer]
        first = 0 if window is None else max(0, start - window + 1)  # the oldest token that the first query sees
        held = end - first
        keys, values = self._keys[layer].narrow(1, first, held), self._values[layer].narrow(1, first, held)
        whole = n == 1 or (start == 0 and (window is None or n <= window))
        mask = None if whole else self._masked(n, held, window)
        out = attention(q if plain else q.to(self.dtype), keys, values, mask, causal=whole and n > 1, cap=self.shape.attention_cap)
        return out if plain else out.float()

    @staticmethod
    def native_spans(spans: Sequence[Span]) -> list[SpanStructure]:
        caches = [(span.cache, span.n) for span in spans if isinstance(span.cache, FullCache)]
        for cache, n in caches:
            cache.room(n)
        return [cache._native_span(n) for cache, n in caches]

    def _native_span(self, n: int) -> SpanStructure:
        if not self._keys or self._keys[0].shape[1] < self.length + n:
            self._grow(self.length + n)
        heads, room, width = self._keys[0].shape
        keys, values = map(ctypes.addressof, self._addresses)
        return SpanStructure(
            rows=n, length=self.length, keys=keys, values=values, entries=heads * room * width, token_stride=width,
            head_stride=room * width, halves=self.dtype == torch.bfloat16,
        )  # fmt: skip

    def _masked(self, n: int, held: int, window: int | None) -> Tensor:
        """The mask, cached for all layers of a pass."""
        if self._mask is None or self._mask[0] != (n, held, window):
            self._mask = (n, held, window), causal_mask(n, held, window)
        return self._mask[1]

    def _grow(self, needed: int) -> None:
        self.room(needed - self.length)
        shape, held = self.shape, self._keys[0].shape[1] if self._keys else 0
        size = min(self.limit, max(FIRST, 2 * held, needed))
        for buffers in (self._keys, self._values):
            for layer in range(shape.layers):
                new = torch.zeros(shape.kv_heads, size, shape.head_dim, dtype=self.dtype)
                if held:
                    new[:, :held] = buffers[layer]  # including cropped entries, from which an early exit is continued
                    buffers[layer] = new
                else:
                    buffers.append(new)
        # views of the same memory by token: [room, Hkv, D], and [room, Hkv, D/2] complex
        self._by_token = tuple([t.transpose(0, 1) for t in buffers] for buffers in (self._keys, self._values))
        self._addresses = [addresses(buffers) for buffers in (self._keys, self._values)]
        if self.dtype == torch.float32:
            self._turned = [as_complex(t) for t in self._by_token[0]]

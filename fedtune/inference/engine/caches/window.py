"""Keeps the first and the newest tokens: bounded memory for endless texts.

Models put much attention on their first tokens, whatever these are. A window that drops them breaks down; one that keeps a few (sinks) does
not. Keys are cached before RoPE, and positions are relative to the cache: with s sinks and a window of w, the query at p has position
min(p, s + w - 1), the sinks 0..s-1, and the window's tokens come directly before the query. So positions stay in the trained range, and a
text may be longer than the context. Without sinks this is the plain sliding window, because scores depend only on position differences.

Source: Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453, section 3.2.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedtune.inference.engine.caches.base import Cache, CacheError, Span, addresses, soft_cap
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape

ROWS = 256  # queries that attend at once in a long prefill


class WindowCache(Cache):
    """Sinks and a ring buffer of the newest tokens.

    Args:
        limit: Maximum tokens of the text; memory does not grow with it.
        window: Newest tokens that a query sees, including itself.
        sinks: First tokens, which every query sees.
        undo: Number of tokens that `crop` can always remove; also the largest pass that needs no copy of the window.
        dtype: Dtype of the entries: float32 or bfloat16.

    Raises:
        CacheError: The numbers exclude each other, or do not fit the model's own sliding window.
    """

    undo: int

    def __init__(
        self, shape: Shape, limit: int, window: int, sinks: int = 4, *, undo: int = 32, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(shape, limit)
        if window < 1 or sinks < 0 or undo < 1:
            raise CacheError(f"window={window} and undo={undo} must be at least 1 and sinks={sinks} at least 0")
        own = min((w for w in shape.windows if w is not None), default=None)
        if own is not None and sinks >= own:
            raise CacheError(f"{sinks} sinks fill the model's own sliding window of {own} tokens: use fewer")
        self.window, self.sinks, self.undo, self.dtype = window, sinks, undo, dtype
        self._slots = _slots(limit, window, sinks, undo)
        self._ring = self._slots - min(sinks, self._slots)
        self._written = 0  # greatest length so far: older tokens than the ring holds are gone
        self._keys: list[Tensor] = []  # per layer: [slots, Hkv, D], not rotated
        self._values: list[Tensor] = []
        self._pass: tuple[tuple[int, int], Tensor] | None = None
        self._addresses: list[Any] = []  # of the keys and of the values, per layer

    @staticmethod
    def bytes_for(shape: Shape, tokens: int, window: int, sinks: int = 4, *, undo: int = 32, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of a cache for `tokens` tokens."""
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize * _slots(tokens, window, sinks, undo)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._keys, *self._values))

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

    @staticmethod
    def native_spans(spans: Sequence[Span]) -> list[SpanStructure] | None:
        """None also if the rows overwrite tokens that they see."""
        caches = [(span.cache, span.n) for span in spans if isinstance(span.cache, WindowCache)]
        if not all(cache._keeps_all(n) for cache, n in caches):
            return None
        for cache, n in caches:
            cache.room(n)
        return [cache._native_span(n) for cache, n in caches]

    def _native_span(self, n: int) -> SpanStructure:
        self._allocate()
        slots, heads, width = self._keys[0].shape
        keys, values = map(ctypes.addressof, self._addresses)
        return SpanStructure(
            rows=n, length=self.length, keys=keys, values=values, entries=slots * heads * width, token_stride=heads * width,
            head_stride=width, halves=self.dtype == torch.bfloat16, window=self.window, sinks=self.sinks, ring=max(1, self._ring),
        )  # fmt: skip

    def _keeps_all(self, n: int) -> bool:
        """Whether n more rows overwrite no entry that one of them needs."""
        return n <= self.undo or self.length + n <= self._slots

    def _allocate(self) -> None:
        if not self._keys:
            empty = torch.zeros(self._slots, self.shape.kv_heads, self.shape.head_dim, dtype=self.dtype)
            self._keys, self._values = ([empty.clone() for _ in range(self.shape.layers)] for _ in range(2))
            self._addresses = [addresses(self._keys), addresses(self._values)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.room(q.shape[0])
        self._allocate()
        n, start = q.shape[0], self.length
        own = self.shape.windows[layer]
        window = self.window if own is None else min(self.window, own - self.sinks)
        if self._keeps_all(n):
            self._store(layer, start, k, v)
            filled = min(start + n, self._slots)
            keys, values = self._keys[layer][:filled], self._values[layer][:filled]
            return self._attend(q, start, keys, values, self._held(start + n, filled), window, rope)
        out = torch.empty_like(q)
        keys, values, at = self._in_order(layer, start, k, v)
        sinks = int((at < self.sinks).sum())
        for a in range(0, n, ROWS):
            b = min(a + ROWS, n)
            # the rows' tokens are in order after the sinks: skip those that not even the first row sees
            low, high = max(sinks, len(at) - n + a - window + 1), max(sinks, len(at) - n + b)
            seen = torch.cat([torch.arange(sinks), torch.arange(low, high)])
            out[a:b] = self._attend(q[a:b], start + a, keys[seen], values[seen], at[seen], window, rope)
        self._store(layer, start, k, v)
        return out

    def _slot(self, at: Tensor) -> Tensor:
        return torch.where(at < self.sinks, at, self.sinks + (at - self.sinks) % max(1, self._ring))

    def _store(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        n, sinks = k.shape[0], min(max(self.sinks - start, 0), k.shape[0])
        kept = max(sinks, n - self._ring)  # write each slot only once
        if n == 1:
            slot = start if start < self.sinks else self.sinks + (start - self.sinks) % self._ring
            self._keys[layer][slot], self._values[layer][slot] = k[0], v[0]
            return
        rows = torch.cat([torch.arange(sinks), torch.arange(kept, n)])
        slots = self._slot(start + rows)
        self._keys[layer][slots] = k[rows].to(self.dtype)
        self._values[layer][slots] = v[rows].to(self.dtype)

    def _held(self, end: int, filled: int) -> Tensor:
        """[filled]: the position of each slot's token after tokens up to `end` are stored."""
        if self._pass is None or self._pass[0] != (end, filled):
            slot = torch.arange(filled)
            ring = max(1, self._ring)
            newest = slot + (end - 1 - slot).div(ring, rounding_mode="floor") * ring
            self._pass = (end, filled), torch.where(slot < self.sinks, slot, newest)
        return self._pass[1]

    def _in_order(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of the sinks, of the first row's window, and of the new rows, in order of position."""
        held = torch.cat(
            [torch.arange(min(self.sinks, start)), torch.arange(max(self.sinks, start - self.window + 1), max(self.sinks, start))]
        )
        held = held[held < start]
        slots = self._slot(held)
        keys = torch.cat([self._keys[layer][slots].to(k.dtype), k.to(self.dtype).to(k.dtype)])
        values = torch.cat([self._values[layer][slots].to(v.dtype), v.to(self.dtype).to(v.dtype)])
        return keys, values, torch.cat([held, torch.arange(start, start + k.shape[0])])

    def _attend(self, q: Tensor, start: int, keys: Tensor, values: Tensor, at: Tensor, window: int, rope: Rope) -> Tensor:
        """Rows q [n, H, D] from position `start` on, against keys [T, Hkv, D] of positions `at`, the sinks first."""
        n, heads, width = q.shape
        last, kv_heads = self.sinks + window - 1, keys.shape[1]
        moved = max(0, start - last)  # positions are counted from the first row's place in the cache
        sinks = min(self.sinks, len(at))

        def rows(x: Tensor) -> Tensor:
            return x.transpose(0, 1).reshape(kv_heads, -1, width)

        place = torch.where(at < self.sinks, at, (at - moved).clamp_min(0))
        turned = rope.rotate(keys.float(), place).transpose(0, 1).transpose(1, 2)  # [Hkv, D, T]
        q = q * width**-0.5
        scores = rows(rope.rotate(q, start - moved)) @ turned
        if sinks and start + n - 1 > last and n > 1:  # the later rows are as far from the sinks as the first one that is at the end
            stays = torch.arange(start, start + n).clamp_max(last)
            scores[..., :sinks] = rows(rope.rotate(q, stays)) @ turned[..., :sinks]
        soft_cap(scores, self.shape.attention_cap)
        if n > 1 or start > last or len(at) > start + n:
            row = torch.arange(start, start + n).unsqueeze(1)
            seen = (at <= row) & ((at < self.sinks) | (row - at < window))
            scores.unflatten(1, (-1, n)).masked_fill_(~seen, -torch.inf)
        out = scores.softmax(-1) @ values.float().transpose(0, 1)
        return out.view(heads, n, width).transpose(0, 1)


def _slots(limit: int, window: int, sinks: int, undo: int) -> int:
    """Tokens that are kept: sinks, a window, and what `crop` may need again."""
    return min(limit, sinks + window - 1 + undo)

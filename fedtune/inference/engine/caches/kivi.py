"""Keys and values in 8, 4 or 2 bits, the newest tokens in full precision.

Keys are quantized per channel over groups of tokens, values per token over groups of channels: outliers of keys are in a few channels,
values have none. A group is quantized once, when it leaves the window of the `residual` newest tokens.

A query's view depends only on its position: the query at p sees tokens before g * floor((p + 1 - residual) / g) as codes and the rest in
full precision, in prefill, decoding and speculative passes alike. (KIVI's own prefill attends in full precision; then a text's logits
depend on how it is split into passes, and speculation cannot be lossless.) The cost is `undo` more tokens in full precision.

Source: Liu et al. 2024, KIVI, arXiv:2402.02750, algorithm 1. Keys are quantized after RoPE, as there.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.inference.engine.caches.base import SCORES, Cache, CacheError, Span, addresses, soft_cap
from fedtune.inference.engine.caches.packing import WIDTHS, decode, encode, grid, group_size, spread
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape

BLOCK = 1 << 18  # numbers that are dequantized at once, to fit a core's cache


@dataclass(slots=True)
class _Layer:
    """Codes of tokens 0..done-1 in groups of g; tokens from position `first` on in full precision."""

    first: int
    done: int
    keys: Tensor  # [Hkv, room, D]
    values: Tensor
    key_codes: Tensor  # [Hkv, G, g * bits / 8, D] uint8
    key_low: Tensor  # [Hkv, G, 1, D] float16
    key_scale: Tensor
    value_codes: Tensor  # [Hkv, G, g * bits / 8, D] uint8
    value_low: Tensor  # [Hkv, G, g, channel groups] float16
    value_scale: Tensor

    def packed(self) -> tuple[Tensor, ...]:
        return self.key_codes, self.key_low, self.key_scale, self.value_codes, self.value_low, self.value_scale

    def grow(self, groups: int) -> None:
        held = self.done // (self.value_low.shape[2])
        bigger = []
        for t in self.packed():
            new = t.new_empty(t.shape[0], groups, *t.shape[2:])
            new[:, :held] = t[:, :held]
            bigger.append(new)
        self.key_codes, self.key_low, self.key_scale, self.value_codes, self.value_low, self.value_scale = bigger


class KiviCache(Cache):
    """Quantized keys and values, and the newest tokens in full precision.

    Args:
        limit: Maximum number of tokens.
        bits: 8, 4 or 2.
        residual: Newest tokens, including the query, that every query sees in full precision.
        group: Tokens per key group and maximum channels per value group; None means min(32, head_dim), rounded down to whole bytes.
        undo: Number of tokens that `crop` can always remove.
        dtype: Dtype of the newest tokens: float32 or bfloat16.

    Raises:
        CacheError: A number is out of range.
    """

    undo: int

    def __init__(
        self,
        shape: Shape,
        limit: int,
        bits: int = 4,
        *,
        residual: int = 128,
        group: int | None = None,
        undo: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(shape, limit)
        if bits not in WIDTHS:
            raise CacheError(f"a cache cannot have {bits} bits: choose 8, 4 or 2")
        self.bits, self.residual, self.undo, self.dtype = bits, residual, undo, dtype
        self.group = _group(shape, bits, group)
        if residual < 1 or undo < 0:
            raise CacheError(f"residual={residual} must be at least 1 and undo={undo} at least 0")
        self._size = group_size(shape.head_dim, group or 32)
        self._layers: list[_Layer] = []
        self._addresses: list[Any] | None = None  # of keys, values and codes, until a buffer is replaced

    @staticmethod
    def bytes_for(
        shape: Shape,
        tokens: int,
        bits: int,
        *,
        residual: int = 128,
        group: int | None = None,
        undo: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of a cache with `tokens` tokens; an upper bound of `nbytes`."""
        g, width = _group(shape, bits, group), shape.head_dim
        groups = max(0, tokens - residual) // g
        codes = 2 * groups * (g * bits // 8) * width
        grids = 2 * 2 * groups * (width + g * -(-width // group_size(width, group or 32)))
        newest = 2 * min(tokens, residual + undo + g - 1) * width * dtype.itemsize
        return shape.layers * shape.kv_heads * (codes + grids + newest)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self._layers for t in (layer.keys, layer.values, *layer.packed()))

    def can_crop_to(self, length: int) -> bool:
        """True within `undo` tokens of the cache's greatest length, or while nothing is quantized."""
        return super().can_crop_to(length) and all(layer.first <= self._seen_as_codes(length) for layer in self._layers)

    def crop(self, length: int) -> None:
        if super().can_crop_to(length) and not self.can_crop_to(length):
            raise CacheError(
                f"the {self.bits}-bit cache of {self.length} tokens cannot be cropped to {length}, only by {self.undo} tokens: "
                "older ones exist only as codes (start the sequence again, or raise undo)"
            )
        super().crop(length)
        for layer in self._layers:
            layer.done = min(
                layer.done, length // self.group * self.group
            )  # a removed token's group is quantized again, from full-precision rows

    @staticmethod
    def native_spans(spans: Sequence[Span]) -> list[SpanStructure] | None:
        """None also for more rows than can be undone, or whose own tokens become codes: these need buffers of their own."""
        caches = [(span.cache, span.n) for span in spans if isinstance(span.cache, KiviCache)]
        if any(n > min(cache.undo + 1, cache.residual) for cache, n in caches):
            return None
        for cache, n in caches:
            cache.room(n)
        return [cache._native_span(n) for cache, n in caches]

    def _native_span(self, n: int) -> SpanStructure:
        while len(self._layers) < self.shape.layers:
            self._layers.append(self._empty())
        end, own = self.length + n, self._layers[0]
        upto = self._seen_as_codes(end - 1)
        first = min(self._seen_as_codes(end - self.undo), self._seen_as_codes(self.length), upto)
        if upto > own.done or first > own.first:
            for store in self._layers:
                self._quantize(store, store.keys, store.values, upto)
                self._drop(store, first, self.length)
        if self._addresses is None:
            buffers = ([layer.keys for layer in self._layers], [layer.values for layer in self._layers])
            self._addresses = [*map(addresses, buffers), addresses(t for layer in self._layers for t in layer.packed())]
        heads, room, width = own.keys.shape
        keys, values, codes = map(ctypes.addressof, self._addresses)
        return SpanStructure(
            rows=n, length=self.length, keys=keys, values=values, entries=heads * room * width, token_stride=width,
            head_stride=room * width, halves=self.dtype == torch.bfloat16, first=own.first, codes=codes, bits=self.bits, group=self.group,
            values_together=self._size, residual=self.residual, groups=own.key_codes.shape[1],
        )  # fmt: skip

    @staticmethod
    def _drop(store: _Layer, first: int, end: int) -> None:
        """Forget tokens before `first` in full precision, of those before `end`."""
        if first > store.first:
            for buffer in (store.keys, store.values):
                buffer[:, : end - first] = buffer[:, first - store.first : end - store.first].clone()  # they may overlap
            store.first = first

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        self.room(q.shape[0])
        while len(self._layers) < self.shape.layers:
            self._layers.append(self._empty())
        store, start, end = self._layers[layer], self.length, self.length + q.shape[0]
        keys = self._newest(store, store.keys, rope.rotate(k, start), end)
        values = self._newest(store, store.values, v, end)
        self._quantize(store, keys, values, self._seen_as_codes(end - 1))
        q = rope.rotate(q, start) * self.shape.head_dim**-0.5
        out = torch.empty_like(q)
        rows = max(1, SCORES // (self.shape.heads * end))
        for a in range(0, q.shape[0], rows):
            b = min(a + rows, q.shape[0])
            out[a:b] = self._rows(store, q[a:b], start + a, keys, values, self.shape.windows[layer])
        first = max(store.first, min(self._seen_as_codes(end - self.undo), store.done))
        if first > store.first or keys is not store.keys:
            for buffer, now in ((store.keys, keys), (store.values, values)):
                kept = now[:, first - store.first : end - store.first]
                buffer[:, : end - first] = kept.clone() if now is buffer else kept  # they may overlap
            store.first = first
        return out

    def _seen_as_codes(self, position: int) -> int:
        """Number of tokens that the query at `position` sees as codes."""
        return max(0, position + 1 - self.residual) // self.group * self.group

    def _empty(self) -> _Layer:
        heads, width, g = self.shape.kv_heads, self.shape.head_dim, self.group
        room = min(self.limit, self.residual + self.undo + g - 1)
        packed = torch.empty(heads, 0, g * self.bits // 8, width, dtype=torch.uint8)
        low = torch.empty(heads, 0, 1, width, dtype=torch.float16)
        value_low = torch.empty(heads, 0, g, -(-width // self._size), dtype=torch.float16)
        newest = torch.zeros(heads, room, width, dtype=self.dtype)
        return _Layer(0, 0, newest, newest.clone(), packed, low, low.clone(), packed.clone(), value_low, value_low.clone())

    def _newest(self, store: _Layer, buffer: Tensor, new: Tensor, end: int) -> Tensor:
        """[Hkv, >= end - first, D]: the buffer after adding the new rows [n, Hkv, D], or a longer temporary tensor for this pass."""
        rows, at = new.transpose(0, 1), self.length - store.first
        if end - store.first > buffer.shape[1]:
            return torch.cat([buffer[:, :at], rows.to(self.dtype)], 1)
        buffer[:, at : end - store.first] = rows
        return buffer

    def _quantize(self, store: _Layer, keys: Tensor, values: Tensor, upto: int) -> None:
        """Quantize the groups between `done` and `upto`, from the full-precision rows that start at position `first`."""
        g, done = self.group, store.done
        if upto <= done:
            return
        if upto // g > store.key_codes.shape[1]:
            self._addresses = None
            store.grow(min(max(0, self.limit - self.residual) // g, max(4, 2 * store.key_codes.shape[1], upto // g)))
        for a, b in self._blocks(done, upto):  # avoids a float32 copy of a long prompt
            at, rows = slice(a // g, b // g), slice(a - store.first, b - store.first)
            x = keys[:, rows].float().unflatten(1, (-1, g))
            low, scale = grid(x, 2, self.bits)
            store.key_low[:, at], store.key_scale[:, at], store.key_codes[:, at] = low, scale, encode(x, low, scale, self.bits)
            x = values[:, rows].float().unflatten(1, (-1, g))
            pairs = [grid(part, 3, self.bits) for part in x.split(self._size, 3)]
            low, scale = (torch.cat(parts, 3) for parts in zip(*pairs, strict=True))
            store.value_low[:, at], store.value_scale[:, at] = low, scale
            store.value_codes[:, at] = encode(x, self._spread(low), self._spread(scale), self.bits)
        store.done = upto

    def _rows(self, store: _Layer, q: Tensor, start: int, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Attention of q [n, H, D] from position `start` on: one softmax over the scores of codes and of full-precision rows."""
        n, heads, width = q.shape
        end, g = start + n, self.group
        low, high = self._seen_as_codes(start), self._seen_as_codes(end - 1)
        begin = 0 if window is None else min(max(0, start - window + 1), low) // g * g
        q = q.transpose(0, 1).reshape(keys.shape[0], -1, width)  # per key head: its query heads, each with n positions
        full = slice(low - store.first, end - store.first)
        scores = q.new_empty(*q.shape[:2], high - begin + end - low)
        for a, b in self._blocks(begin, high):
            scores[..., a - begin : b - begin] = q @ self._keys(store, a // g, b // g).transpose(1, 2)
        scores[..., high - begin :] = q @ keys[:, full].float().transpose(1, 2)
        soft_cap(scores, self.shape.attention_cap)
        if n > 1 or window is not None:
            seen = self._seen(start, end, begin, low, high, window)
            scores.unflatten(1, (-1, n)).masked_fill_(~seen, -torch.inf)
        weights = scores.softmax(-1)
        out = weights[..., high - begin :] @ values[:, full].float()
        for a, b in self._blocks(begin, high):
            out.baddbmm_(weights[..., a - begin : b - begin], self._values(store, a // g, b // g))
        return out.view(heads, n, width).transpose(0, 1)

    def _seen(self, start: int, end: int, begin: int, low: int, high: int, window: int | None) -> Tensor:
        """[n, columns] bool. Columns: tokens begin..high-1 as codes, then low..end-1 in full precision; a query sees each token in one
        form."""
        at = torch.arange(start, end).unsqueeze(1)
        edge = (at + 1 - self.residual).clamp_min(0) // self.group * self.group
        codes, full = torch.arange(begin, high), torch.arange(low, end)
        seen = torch.cat([codes < edge, (full >= edge) & (full <= at)], 1)
        return seen if window is None else seen & (at - torch.cat([codes, full]) < window)

    def _blocks(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Split tokens begin..end-1 (group boundaries) into ranges whose keys fill a block."""
        step = max(1, BLOCK // (self.shape.kv_heads * self.shape.head_dim * self.group)) * self.group
        return ((a, min(a + step, end)) for a in range(begin, end, step))

    def _keys(self, store: _Layer, a: int, b: int) -> Tensor:
        """Dequantize key groups a..b-1: [Hkv, tokens, D] float32."""
        return decode(store.key_codes[:, a:b], store.key_low[:, a:b], store.key_scale[:, a:b], self.bits).flatten(1, 2)

    def _values(self, store: _Layer, a: int, b: int) -> Tensor:
        low, scale = self._spread(store.value_low[:, a:b]), self._spread(store.value_scale[:, a:b])
        return decode(store.value_codes[:, a:b], low, scale, self.bits).flatten(1, 2)

    def _spread(self, x: Tensor) -> Tensor:
        return spread(x, self._size, self.shape.head_dim)


def _group(shape: Shape, bits: int, group: int | None) -> int:
    """Tokens per key group: a whole number of packed bytes."""
    whole = 8 // bits
    g = (min(32, shape.head_dim) if group is None else group) // whole * whole
    if g < 1:
        raise CacheError(f"group={group} does not fill a byte at {bits} bits: give at least {whole}")
    return g

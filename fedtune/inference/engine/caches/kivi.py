"""Keys and values in 8, 4 or 2 bits, the newest tokens in full precision.

Keys are quantized per channel over groups of tokens, values per token over groups of channels: outliers of keys are in a few channels,
values have none. A group is quantized once, when it leaves the window of the `residual` newest tokens.

A query's view depends only on its position: the query at p sees tokens before g * floor((p + 1 - residual) / g) as codes and the rest in
full precision, in prefill, decoding and speculative passes alike. (KIVI's own prefill attends in full precision; then a text's logits
depend on how it is split into passes, and speculation cannot be lossless.) The cost is `undo` more tokens in full precision.

Source: Liu et al. 2024, KIVI, arXiv:2402.02750, algorithm 1. Keys are quantized after RoPE, as there.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.aligned import zeros
from fedtune.inference.engine.bfloat16 import DTYPES, Array, as_float32, to_dtype
from fedtune.inference.engine.caches.base import Cache, CacheError, addresses
from fedtune.inference.engine.caches.packing import WIDTHS, Codes, Floats, Halves, decode, encode, grid, group_size, spread
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape


@dataclass(slots=True)
class _Layer:
    """Codes of tokens 0..done-1 in groups of g; tokens from position `first` on in full precision."""

    first: int
    done: int
    keys: Array  # [Hkv, room, D]
    values: Array
    key_codes: Codes  # [Hkv, G, g * bits / 8, D]
    key_low: Halves  # [Hkv, G, 1, D]
    key_scale: Halves
    value_codes: Codes  # [Hkv, G, g * bits / 8, D]
    value_low: Halves  # [Hkv, G, g, channel groups]
    value_scale: Halves

    def packed(self) -> tuple[Array, ...]:
        return self.key_codes, self.key_low, self.key_scale, self.value_codes, self.value_low, self.value_scale

    def grow(self, groups: int) -> None:
        held = self.done // (self.value_low.shape[2])
        bigger: list[Any] = []
        for a in self.packed():
            new = zeros((a.shape[0], groups, *a.shape[2:]), a.dtype)
            new[:, :held] = a[:, :held]
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

    Attributes:
        layers: The layers' buffers.

    Raises:
        CacheError: A number is out of range.
    """

    undo: int

    def __init__(
        self, shape: Shape, limit: int, bits: int = 4, *, residual: int = 128, group: int | None = None, undo: int = 32,
        dtype: str = "float32",
    ) -> None:  # fmt: skip
        super().__init__(shape, limit, dtype)
        if bits not in WIDTHS:
            raise CacheError(f"a cache cannot have {bits} bits: choose 8, 4 or 2")
        self.bits, self.residual, self.undo = bits, residual, undo
        self.group = _group(shape, bits, group)
        if residual < 1 or undo < 0:
            raise CacheError(f"residual={residual} must be at least 1 and undo={undo} at least 0")
        self._size = group_size(shape.head_dim, group or 32)
        self._room = min(limit, residual + undo + self.group - 1)  # tokens in full precision
        self.layers: list[_Layer] = []
        self._addresses: list[Any] | None = None  # of keys, values and codes, until a buffer is replaced

    @staticmethod
    def bytes_for(
        shape: Shape, tokens: int, bits: int, *, residual: int = 128, group: int | None = None, undo: int = 32, dtype: str = "float32"
    ) -> int:
        """Bytes of a cache with `tokens` tokens; an upper bound of `nbytes`."""
        g, width = _group(shape, bits, group), shape.head_dim
        groups = max(0, tokens - residual) // g
        codes = 2 * groups * (g * bits // 8) * width
        grids = 2 * 2 * groups * (width + g * -(-width // group_size(width, group or 32)))
        newest = 2 * min(tokens, residual + undo + g - 1) * width * DTYPES[dtype].itemsize
        return shape.layers * shape.kv_heads * (codes + grids + newest)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for layer in self.layers for a in (layer.keys, layer.values, *layer.packed()))

    def most(self, n: int) -> int:
        """A pass must not have rows that see others of it as codes, nor more than fit beside the older tokens that its first row sees."""
        room = self._room - (self.length - self.seen_as_codes(self.length))
        return min(n, max(min(self.residual, room), self.residual - self.length))

    def can_crop_to(self, length: int) -> bool:
        """True within `undo` tokens of the cache's greatest length, or while nothing is quantized."""
        return super().can_crop_to(length) and all(layer.first <= self.seen_as_codes(length) for layer in self.layers)

    def crop(self, length: int) -> None:
        if super().can_crop_to(length) and not self.can_crop_to(length):
            raise CacheError(
                f"the {self.bits}-bit cache of {self.length} tokens cannot be cropped to {length}, only by {self.undo} tokens: "
                "older ones exist only as codes (start the sequence again, or raise undo)"
            )
        super().crop(length)
        for layer in self.layers:
            # a removed token's group is quantized again, from full-precision rows
            layer.done = min(layer.done, length // self.group * self.group)

    def prepare(self, n: int) -> None:
        self.require_capacity(n)
        while len(self.layers) < self.shape.layers:
            self.layers.append(self._empty())
        end = self.length + n
        upto = self.seen_as_codes(end - 1)
        first = min(self.seen_as_codes(end - self.undo), self.seen_as_codes(self.length), upto)
        if any(upto > store.done or first > store.first for store in self.layers):  # not all, after keys that are too large
            for store in self.layers:
                self._quantize(store, upto)
                self._drop(store, first)

    def native_span(self, n: int) -> SpanStructure:
        own = self.layers[0]
        if self._addresses is None:
            buffers = ([layer.keys for layer in self.layers], [layer.values for layer in self.layers])
            self._addresses = [*map(addresses, buffers), addresses(a for layer in self.layers for a in layer.packed())]
        heads, room, width = own.keys.shape
        keys, values, codes = map(ctypes.addressof, self._addresses)
        return SpanStructure(
            rows=n, length=self.length, keys=keys, values=values, entries=heads * room * width, token_stride=width,
            head_stride=room * width, halves=self.dtype == np.uint16, first=own.first, codes=codes, bits=self.bits, group=self.group,
            values_together=self._size, residual=self.residual, groups=own.key_codes.shape[1],
        )  # fmt: skip

    def write(self, layer: int, k: NDArray[np.float32], v: NDArray[np.float32], rope: Rope) -> None:
        store = self.layers[layer]
        rows = slice(self.length - store.first, self.length - store.first + len(k))
        store.keys[:, rows] = to_dtype(rope.rotate(k, self.length), self.dtype).swapaxes(0, 1)
        store.values[:, rows] = to_dtype(v, self.dtype).swapaxes(0, 1)

    def _drop(self, store: _Layer, first: int) -> None:
        """Forget tokens before `first` in full precision."""
        if first > store.first:
            for buffer in (store.keys, store.values):
                buffer[:, : self.length - first] = buffer[:, first - store.first : self.length - store.first].copy()  # they may overlap
            store.first = first

    def seen_as_codes(self, position: int) -> int:
        """Number of tokens that the query at `position` sees as codes."""
        return max(0, position + 1 - self.residual) // self.group * self.group

    def _empty(self) -> _Layer:
        heads, width, g = self.shape.kv_heads, self.shape.head_dim, self.group
        codes, low = np.empty((heads, 0, g * self.bits // 8, width), np.uint8), np.empty((heads, 0, 1, width), np.float16)
        value_low = np.empty((heads, 0, g, -(-width // self._size)), np.float16)
        keys, values = (zeros((heads, self._room, width), self.dtype) for _ in range(2))
        return _Layer(0, 0, keys, values, codes, low, low, codes, value_low, value_low)

    def _quantize(self, store: _Layer, upto: int) -> None:
        """Quantize the groups between `done` and `upto`, from their full-precision rows."""
        g, done = self.group, store.done
        if upto <= done:
            return
        if upto // g > store.key_codes.shape[1]:
            self._addresses = None
            store.grow(min(max(0, self.limit - self.residual) // g, max(4, 2 * store.key_codes.shape[1], upto // g)))
        at, rows = slice(done // g, upto // g), slice(done - store.first, upto - store.first)
        x = self._grouped(store.keys[:, rows])
        low, scale = grid(x, 2, self.bits)
        store.key_low[:, at], store.key_scale[:, at], store.key_codes[:, at] = low, scale, encode(x, low, scale, self.bits)
        x = self._grouped(store.values[:, rows])
        pairs = [grid(x[..., c : c + self._size], 3, self.bits) for c in range(0, x.shape[3], self._size)]
        low, scale = (np.concatenate(parts, 3) for parts in zip(*pairs, strict=True))
        store.value_low[:, at], store.value_scale[:, at] = low, scale
        store.value_codes[:, at] = encode(x, self._spread(low), self._spread(scale), self.bits)
        store.done = upto

    def _grouped(self, rows: Array) -> Floats:
        """[Hkv, tokens, D] -> [Hkv, groups, g, D] float32."""
        return as_float32(rows).reshape(len(rows), rows.shape[1] // self.group, self.group, rows.shape[2])

    def dequantized(self, layer: int, a: int, b: int) -> tuple[Floats, Floats]:
        """Keys and values [Hkv, tokens, D] of the groups a..b-1."""
        store = self.layers[layer]
        low, scale = self._spread(store.value_low[:, a:b]), self._spread(store.value_scale[:, a:b])
        both = (
            decode(store.key_codes[:, a:b], store.key_low[:, a:b], store.key_scale[:, a:b], self.bits),
            decode(store.value_codes[:, a:b], low, scale, self.bits),
        )
        keys, values = (x.reshape(len(x), (b - a) * self.group, self.shape.head_dim) for x in both)
        return keys, values

    def _spread(self, x: Halves) -> Halves:
        return spread(x, self._size, self.shape.head_dim)


def _group(shape: Shape, bits: int, group: int | None) -> int:
    """Tokens per key group: a whole number of packed bytes."""
    whole = 8 // bits
    g = (min(32, shape.head_dim) if group is None else group) // whole * whole
    if g < 1:
        raise CacheError(f"group={group} does not fill a byte at {bits} bits: give at least {whole}")
    return g

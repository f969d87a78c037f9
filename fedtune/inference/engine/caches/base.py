"""The interface between decoder and caches, and passes over several sequences.

A pass runs over flat rows: the tokens of all its spans, one span after the other. Linears see all rows at once; attention goes span by
span, so sequences of different lengths need no padding.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedtune.errors import FedtuneError
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape

SCORES = 1 << 22  # attention weights in memory at once, where torch's fused attention cannot be used


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
    """

    cache: "Cache"
    n: int
    keep: int | None = 1
    adapter: str | None = None


class Cache(ABC):
    """Keys and values of ONE sequence in all layers.

    Attributes:
        length: Tokens so far: the absolute position of the next one.
        limit: Maximum number of tokens.
        undo: Number of tokens that `crop` can always remove; None: all.
    """

    undo: int | None = None

    def __init__(self, shape: Shape, limit: int) -> None:
        if limit < 1:
            raise CacheError(f"a cache's limit must be at least 1 token, not {limit}")
        self.shape = shape
        self.limit = limit
        self.length = 0

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """Store k and v at positions length..length+n-1 and attend causally, within the layer's window (`shape.windows[layer]`).

        Args:
            q: [n, H, D] float32, not yet rotated.
            k: [n, Hkv, D] float32, not yet rotated.
            v: [n, Hkv, D] float32.

        Returns:
            [n, H, D] float32.

        Raises:
            CacheError: The cache would hold more than `limit` tokens.
        """

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

    def room(self, n: int) -> None:
        """Raise CacheError if n more tokens exceed the limit."""
        if self.length + n > self.limit:
            raise CacheError(f"{self.length} + {n} tokens exceed the cache's limit of {self.limit}: shorten the text or raise the limit")

    @staticmethod
    def native_spans(spans: Sequence[Span]) -> list[SpanStructure] | None:
        """Reserve room for the rows of a pass, and describe where native code stores and reads keys and values.

        Returns:
            One structure per span, valid until a cache changes; None if there is no native form, and nothing is reserved.

        Raises:
            CacheError: A cache is full; nothing has changed.
        """
        return None

    @staticmethod
    def attend_many(layer: int, spans: Sequence[Span], q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        """`attend` for all spans of a pass: q [rows, H, D], k, v [rows, Hkv, D] -> [rows, H, D].

        The decoder calls it on the class of the first span's cache if all are of that class, else on `Cache`.
        """
        if len(spans) == 1:
            return spans[0].cache.attend(layer, q, k, v, rope)
        out = torch.empty_like(q)
        at = 0
        for span in spans:
            rows = slice(at, at + span.n)
            out[rows] = span.cache.attend(layer, q[rows], k[rows], v[rows], rope)
            at += span.n
        return out


def addresses(tensors: Iterable[Tensor]) -> Any:
    """An array of the tensors' addresses for native code."""
    found = [t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def causal_mask(n: int, held: int, window: int | None) -> Tensor:
    """[n, held] bool: query i is at position held - n + i and sees itself and earlier tokens, at most `window` in total."""
    behind = torch.arange(held - n, held).unsqueeze(1) - torch.arange(held)
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), in place; x itself if `cap` is None."""
    return x if cap is None else x.div_(cap).tanh_().mul_(cap)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False, cap: float | None = None) -> Tensor:
    """Grouped-query attention.

    Args:
        q: [n, H, D].
        k, v: [Hkv, T, D], of q's dtype.
        mask: [n, T] bool; None: every query sees every key.
        causal: Use a causal mask instead of `mask`; needs n = T.
        cap: Soft cap of the scores.

    Returns:
        [n, H, D].
    """
    n, heads, width = q.shape
    if cap is not None:
        mask = causal_mask(n, n, None) if causal else mask
        rows = max(1, SCORES // (heads * k.shape[1]))
        parts = [_capped(q[a : a + rows], k, v, None if mask is None else mask[a : a + rows], cap) for a in range(0, n, rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    groups = heads // k.shape[0]
    if n == 1:  # the query heads of a group become rows of one product
        out = scaled_dot_product_attention(q.view(1, -1, groups, width), k.unsqueeze(0), v.unsqueeze(0))
        return out.view(1, heads, width)
    out = scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, is_causal=causal, enable_gqa=groups > 1
    )
    return out.squeeze(0).transpose(0, 1)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Attention with a soft cap, which torch's fused attention does not have."""
    n, heads, width = q.shape
    scores = (q.transpose(0, 1).reshape(k.shape[0], -1, width) @ k.transpose(1, 2)).float().mul_(width**-0.5)  # [Hkv, groups * n, T]
    soft_cap(scores, cap)
    if mask is not None:
        scores.unflatten(1, (-1, n)).masked_fill_(~mask, -torch.inf)
    return (scores.softmax(-1).to(v.dtype) @ v).view(heads, n, width).transpose(0, 1)

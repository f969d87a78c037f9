"""Attention over the caches by torch, one sequence at a time."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedtune.inference.engine.caches.base import Cache
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.paged import PagedCache
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.reference.tensors import as_array, as_tensor
from fedtune.inference.engine.rope import Rope

__all__ = ["attend", "attention", "causal_mask", "rotate", "soft_cap"]

SCORES = 1 << 22  # attention weights in memory at once, where torch's fused attention cannot be used


def attend(cache: Cache, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
    """Store the keys and values of a prepared pass and attend causally, within the layer's window (`shape.windows[layer]`).

    Args:
        q: [n, H, D] float32, not yet rotated.
        k, v: [n, Hkv, D] float32, k not yet rotated.

    Returns:
        [n, H, D] float32.
    """
    cache.write(layer, as_array(k), as_array(v), rope)
    if isinstance(cache, WindowCache):
        return _window(cache, layer, q, rope)
    q = rotate(rope, q, cache.length)
    if isinstance(cache, KiviCache):
        return _kivi(cache, layer, q)
    start, end, window = cache.length, cache.length + len(q), cache.shape.windows[layer]
    if isinstance(cache, PagedCache):
        size = cache.pool.block
        blocks = cache.table[: -(-end // size)]
        keys, values = (as_tensor(a[layer][blocks]).flatten(0, 1)[:end].transpose(0, 1) for a in (cache.pool.keys, cache.pool.values))
    else:
        assert isinstance(cache, FullCache)
        keys, values = (as_tensor(a[layer])[:, :end] for a in (cache.keys, cache.values))
    first = 0 if window is None else max(0, start - window + 1)  # the oldest token that the first query sees
    whole = len(q) == 1 or (start == 0 and (window is None or len(q) <= window))
    mask = None if whole else causal_mask(len(q), end - first, window)
    cap = cache.shape.attention_cap
    return attention(q.to(keys.dtype), keys[:, first:], values[:, first:], mask, causal=whole and len(q) > 1, cap=cap).float()


def rotate(rope: Rope, x: Tensor, positions: NDArray[np.int64] | int) -> Tensor:
    """`Rope.rotate` for a tensor [n, H, D]."""
    return torch.from_numpy(rope.rotate(as_array(x), positions))


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


def _window(cache: WindowCache, layer: int, q: Tensor, rope: Rope) -> Tensor:
    """Queries [n, H, D], not rotated, against the sinks and the ring: positions are relative to the cache."""
    n, heads, width = q.shape
    start, at = cache.length, cache.held(len(q))
    own = cache.shape.windows[layer]
    window = cache.window if own is None else min(cache.window, own - cache.sinks)
    keys, values = (as_tensor(a[layer][: len(at)]).float() for a in (cache.keys, cache.values))
    last, kv_heads = cache.sinks + window - 1, keys.shape[1]
    moved = max(0, start - last)  # positions are counted from the first row's place in the cache
    sinks = min(cache.sinks, len(at))

    def rows(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(kv_heads, -1, width)

    place = np.where(at < cache.sinks, at, np.maximum(at - moved, 0))
    turned = rotate(rope, keys, place).transpose(0, 1).transpose(1, 2)  # [Hkv, D, T]
    q = q * width**-0.5
    scores = rows(rotate(rope, q, start - moved)) @ turned
    if sinks and start + n - 1 > last and n > 1:  # the later rows are as far from the sinks as the first one that is at the end
        stays = np.minimum(np.arange(start, start + n), last)
        scores[..., :sinks] = rows(rotate(rope, q, stays)) @ turned[..., :sinks]
    soft_cap(scores, cache.shape.attention_cap)
    if n > 1 or start > last or len(at) > start + n:
        row = np.arange(start, start + n)[:, None]
        seen = (at <= row) & ((at < cache.sinks) | (row - at < window))
        scores.unflatten(1, (-1, n)).masked_fill_(~torch.from_numpy(seen), -torch.inf)
    out = scores.softmax(-1) @ values.transpose(0, 1)
    return out.view(heads, n, width).transpose(0, 1)


def _kivi(cache: KiviCache, layer: int, q: Tensor) -> Tensor:
    """Rotated queries [n, H, D]: one softmax over the scores of codes and of full-precision rows."""
    n, heads, width = q.shape
    store, start, end, g = cache.layers[layer], cache.length, cache.length + len(q), cache.group
    window = cache.shape.windows[layer]
    low, high = cache.seen_as_codes(start), cache.seen_as_codes(end - 1)
    begin = 0 if window is None else min(max(0, start - window + 1), low) // g * g
    code_keys, code_values = map(torch.from_numpy, cache.dequantized(layer, begin // g, high // g))
    full = slice(low - store.first, end - store.first)
    keys = torch.cat([code_keys, as_tensor(store.keys[:, full]).float()], 1)
    values = torch.cat([code_values, as_tensor(store.values[:, full]).float()], 1)
    q = (q * width**-0.5).transpose(0, 1).reshape(keys.shape[0], -1, width)  # per key head: its query heads, each with n positions
    scores = soft_cap(q @ keys.transpose(1, 2), cache.shape.attention_cap)
    if n > 1 or window is not None:
        at = np.arange(start, end)[:, None]
        edge = np.maximum(at + 1 - cache.residual, 0) // g * g
        codes, rows = np.arange(begin, high), np.arange(low, end)
        seen = np.concatenate([codes < edge, (rows >= edge) & (rows <= at)], 1)
        seen = seen if window is None else seen & (at - np.concatenate([codes, rows]) < window)
        scores.unflatten(1, (-1, n)).masked_fill_(~torch.from_numpy(seen), -torch.inf)
    out = scores.softmax(-1) @ values
    return out.view(heads, n, width).transpose(0, 1)

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtune.inference.engine.caches.kivi as kivi
from fedtune.inference.engine.caches.base import CacheError
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.packing import Codes, Floats
from fedtune.inference.engine.reference.attention import rotate
from fedtune.inference.engine.rope import Rope
from tests.inference.engine.caches.reference import passes, shape, tokens

SHAPE = shape(layers=2, heads=4, kv_heads=2, head_dim=10)
QKV = tokens(SHAPE, 41)
ROPE = Rope(SHAPE)


def round_values(x: torch.Tensor, dim: int, bits: int) -> torch.Tensor:
    """Min/max rounding as in the paper, nothing packed; low and step are the float16 numbers next to the exact ones, outside the range."""
    low, high = x.amin(dim, keepdim=True).numpy(), x.amax(dim, keepdim=True).numpy()
    low16 = low.astype(np.float16)
    low16 = np.where(low16 > low, np.nextafter(low16, np.float16(-np.inf)), low16).astype(np.float32)
    step = (high - low16) / np.float32(2**bits - 1)
    step16 = step.astype(np.float16)
    step16 = np.where(step16 < step, np.nextafter(step16, np.float16(np.inf)), step16).astype(np.float32)
    return torch.from_numpy(np.round((x.numpy() - low16) / step16) * step16 + low16)


def reference(bits: int, residual: int, group: int, sizes: list[int]) -> torch.Tensor:
    """KIVI token by token: whole groups of keys by channel, values by token, the newest in full."""
    q, k, v = QKV
    out = torch.empty_like(q)
    for i in range(q.shape[0]):
        turned, keys = rotate(ROPE, q[i], 0), rotate(ROPE, k[i], 0)
        low_keys = torch.cat([round_values(part, 0, bits) for part in keys[: 41 // group * group].split(group)])
        low_values = torch.cat([round_values(part, 2, bits) for part in v[i].split(sizes, 2)], 2)
        for p in range(41):
            edge = max(0, p + 1 - residual) // group * group
            seen_keys = torch.cat([low_keys[:edge], keys[edge : p + 1]])
            seen_values = torch.cat([low_values[:edge], v[i, edge : p + 1]])
            for h in range(4):
                weights = (seen_keys[:, h // 2] @ turned[p, h] / 10**0.5).softmax(0)
                out[i, p, h] = weights @ seen_values[:, h // 2]
    return out


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group, sizes", [(8, [5, 5]), (4, [4, 4, 2])])
def test_kivi_equals_the_reference_algorithm(bits: int, group: int, sizes: list[int]) -> None:
    want = reference(bits, 6, group, sizes)
    for cuts in ([41], [1] * 41, [17, 1, 1, 9, 1, 12]):
        got = passes(KiviCache(SHAPE, 41, bits, residual=6, group=group, undo=3), ROPE, QKV, cuts)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_more_bits_give_a_smaller_error() -> None:
    full = passes(FullCache(SHAPE, 41), ROPE, QKV, [41])
    off = [(passes(KiviCache(SHAPE, 41, bits, residual=6, undo=2), ROPE, QKV, [41]) - full).abs().mean().item() for bits in (8, 4, 2)]
    assert off[0] < off[1] / 8 < off[2] / 16  # a step is 16 and 5 times as wide
    assert off[0] > 0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_residual_over_the_whole_text_is_the_full_cache(bits: int) -> None:
    got = passes(KiviCache(SHAPE, 41, bits, residual=41), ROPE, QKV, [20, 1, 1, 19])
    torch.testing.assert_close(got, passes(FullCache(SHAPE, 41), ROPE, QKV, [41]), atol=1e-5, rtol=1e-5)


def test_a_group_is_quantized_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = kivi.encode

    def count_quantized(x: Floats, *rest: Any) -> Codes:
        calls.append(x.shape[1])
        return real(x, *rest)

    monkeypatch.setattr(kivi, "encode", count_quantized)
    cache = KiviCache(SHAPE, 41, 4, residual=6, group=4, undo=2)
    passes(cache, ROPE, QKV, [13])
    before = [a[:, : cache.layers[0].done // 4].copy() for a in cache.layers[0].packed()]
    passes(cache, ROPE, QKV, [1] * 28, 13)
    after = cache.layers[0].packed()
    assert all(np.array_equal(a[:, : b.shape[1]], b) for a, b in zip(after, before, strict=True))
    assert sum(calls) == 2 * 2 * 8  # keys and values of 2 layers, (41 - 6) // 4 = 8 groups each


@pytest.mark.parametrize("bits, code", [(8, 8), (4, 4), (2, 2)])
def test_bytes_by_hand(bits: int, code: int) -> None:
    cache = KiviCache(SHAPE, 41, bits, residual=6, group=8, undo=3)
    passes(cache, ROPE, QKV, [41])
    # by hand, a layer and key head: 4 groups of 8 tokens ((41 - 6) // 8) of 10 channels
    codes = 2 * 4 * code * 10  # 8 tokens of one channel take `bits` bytes
    keys, values = 4 * 10 * 2 * 2, 4 * 8 * 2 * 2 * 2  # low and scale in 2 bytes: each channel; each token's 2 groups of 5 channels
    newest = 2 * 10 * 4 * (6 + 3 + 8 - 1)
    assert cache.nbytes == 2 * 2 * (codes + keys + values + newest) == KiviCache.bytes_for(SHAPE, 41, bits, residual=6, group=8, undo=3)


@pytest.mark.parametrize("cuts", [[41], [1] * 41, [30, 3]])
def test_the_memory_is_at_most_the_reported_bytes(cuts: list[int]) -> None:
    for limit in (41, 60):
        cache = KiviCache(SHAPE, limit, 4, residual=6, group=4, undo=3)
        passes(cache, ROPE, QKV, cuts)
        assert 0 < cache.nbytes <= KiviCache.bytes_for(SHAPE, limit, 4, residual=6, group=4, undo=3)


@pytest.mark.parametrize("residual, undo, group", [(6, 0, 4), (6, 3, 4), (2, 9, 4), (20, 1, 8)])
def test_a_pass_is_as_long_as_its_buffer_allows(residual: int, undo: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass has no row that sees another one as codes, and may have at least `undo` rows."""
    sizes: list[int] = []
    real = kivi.encode

    def watch(x: Floats, *rest: Any) -> Codes:
        sizes.append(x.shape[1] * x.shape[2])
        return real(x, *rest)

    monkeypatch.setattr(kivi, "encode", watch)
    cache = KiviCache(SHAPE, 41, 4, residual=residual, group=group, undo=undo)
    assert cache.most(41) >= residual and cache.most(3) == min(3, residual)
    for length in range(41):
        n = cache.most(41 - length)
        assert n >= min(undo + 1, residual, 41 - length) and cache.seen_as_codes(length + n - 1) <= length
        passes(cache, ROPE, QKV, [1], length)
    passes(KiviCache(SHAPE, 41, 4, residual=residual, group=group, undo=undo), ROPE, QKV, [41])
    assert max(sizes) <= residual + undo + group - 1  # a long text is quantized in pieces


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_outputs_do_not_depend_on_passes_and_crops(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([8, 4, 2]))
    how: dict[str, Any] = {
        "residual": data.draw(st.integers(1, 9)),
        "group": data.draw(st.sampled_from([4, 8])),
    }
    whole = passes(KiviCache(SHAPE, 41, bits, undo=0, **how), ROPE, QKV, [41])
    wrong = tokens(SHAPE, 41, seed=1)
    undo = data.draw(st.integers(0, 12))
    cache = KiviCache(SHAPE, 41, bits, undo=undo, **how)
    while cache.length < 41:
        at = cache.length
        drafts = data.draw(st.integers(0, min(undo, 41 - at)))
        if drafts:
            passes(cache, ROPE, wrong, data.draw(st.sampled_from([[drafts], [1] * drafts])), at)
            cache.crop(at)
        n = data.draw(st.integers(1, 41 - at))
        torch.testing.assert_close(passes(cache, ROPE, QKV, [n], at), whole[:, at : at + n], atol=1e-5, rtol=1e-5)


def test_a_crop_beyond_undo_is_refused_if_it_would_be_wrong() -> None:
    cache = KiviCache(SHAPE, 41, 4, residual=6, group=4, undo=3)
    passes(cache, ROPE, QKV, [30])
    # the query at 27 sees codes up to (27 + 1 - 6) // 4 * 4 = 20, the one at 24 up to 16, which now exist only as codes
    assert [c for c in range(31) if cache.can_crop_to(c)] == [25, 26, 27, 28, 29, 30]
    with pytest.raises(CacheError, match="4-bit cache of 30 tokens cannot be cropped to 24, only by 3 tokens"):
        cache.crop(24)
    early = KiviCache(SHAPE, 41, 4, residual=6, group=4, undo=3)
    passes(early, ROPE, QKV, [9])
    early.crop(0)  # nothing is quantized yet
    torch.testing.assert_close(passes(early, ROPE, QKV, [41]), passes(KiviCache(SHAPE, 41, 4, residual=6, group=4), ROPE, QKV, [41]))


@pytest.mark.parametrize("cuts", [[41], [1] * 41, [17, 1, 1, 22]])
def test_the_models_own_window_applies(cuts: list[int]) -> None:
    own = shape(layers=2, heads=4, kv_heads=2, head_dim=10, windows=(7, None))
    got = passes(KiviCache(own, 41, 8, residual=3, group=4), ROPE, QKV, cuts)
    full = passes(FullCache(own, 41), ROPE, QKV, [41])
    assert (got - full).abs().max() < 0.05
    wide = passes(FullCache(SHAPE, 41), ROPE, QKV, [41])
    assert (full - wide).abs().max() > 0.5


@pytest.mark.parametrize("head_dim", [2, 6, 26, 34, 48, 74])
@pytest.mark.parametrize("bits", [8, 2])
def test_any_head_size_is_supported_or_refused(head_dim: int, bits: int) -> None:
    odd = shape(layers=1, heads=2, kv_heads=1, head_dim=head_dim)
    qkv, rope = tokens(odd, 50), Rope(odd)
    if bits == 2 and head_dim == 2:
        with pytest.raises(CacheError, match="does not fill a byte at 2 bits"):
            KiviCache(odd, 50, bits)
        return
    cache = KiviCache(odd, 50, bits, residual=4, undo=1)
    got = passes(cache, rope, qkv, [40, 1, 9])
    assert (got - passes(FullCache(odd, 50), rope, qkv, [50])).abs().max() < (0.05 if bits == 8 else 2.5)
    assert cache.nbytes == KiviCache.bytes_for(odd, 50, bits, residual=4, undo=1)


def test_newest_tokens_in_bfloat16_take_half_and_do_not_depend_on_the_passes() -> None:
    how: dict[str, Any] = {"residual": 6, "group": 4, "undo": 3, "dtype": "bfloat16"}
    cache = KiviCache(SHAPE, 41, 8, **how)
    whole = passes(cache, ROPE, QKV, [41])
    torch.testing.assert_close(passes(KiviCache(SHAPE, 41, 8, **how), ROPE, QKV, [1] * 41), whole, atol=1e-5, rtol=1e-5)
    assert (whole - passes(FullCache(SHAPE, 41), ROPE, QKV, [41])).abs().max() < 0.1
    assert cache.nbytes == KiviCache.bytes_for(SHAPE, 41, 8, **how) < KiviCache.bytes_for(SHAPE, 41, 8, residual=6, group=4, undo=3)


def test_impossible_settings_give_a_one_sentence_error() -> None:
    with pytest.raises(CacheError, match="3 bits: choose 8, 4 or 2"):
        KiviCache(SHAPE, 41, 3)
    with pytest.raises(CacheError, match="residual=0"):
        KiviCache(SHAPE, 41, 4, residual=0)
    with pytest.raises(CacheError, match="exceed the cache's limit"):
        passes(KiviCache(SHAPE, 8, 4), ROPE, QKV, [5, 4])

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.inference.engine.caches.base import CacheError
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.rope import Rope
from tests.inference.engine.caches.reference import passes, reference_attention, shape, tokens

SHAPE = shape(layers=2, heads=4, kv_heads=2, head_dim=6)
QKV = tokens(SHAPE, 23)
ROPE = Rope(SHAPE)


def streaming_attention(window: int, sinks: int) -> torch.Tensor:
    """StreamingLLM from its description: each query attends to the sinks and its window, with positions in the cache."""

    def visible(p: int) -> list[int]:
        return sorted({*range(min(sinks, p + 1)), *range(max(0, p - window + 1), p + 1)})

    def place(p: int, j: int) -> tuple[int, int]:
        kept = visible(p)
        return len(kept) - 1, kept.index(j)

    return reference_attention(ROPE, QKV, visible, place)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("cuts", [[23], [1] * 23, [9, 1, 7, 2, 1, 1, 2], [2, 20, 1]])
def test_a_text_beyond_the_length_equals_the_reference_window(sinks: int, cuts: list[int]) -> None:
    got = passes(WindowCache(SHAPE, 23, 5, sinks, undo=3), ROPE, QKV, cuts)
    torch.testing.assert_close(got, streaming_attention(5, sinks), atol=1e-5, rtol=1e-5)


def test_without_sinks_cache_positions_and_absolute_positions_give_the_same_scores() -> None:
    plain = reference_attention(ROPE, QKV, lambda p: list(range(max(0, p - 4), p + 1)))
    torch.testing.assert_close(streaming_attention(5, 0), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(passes(WindowCache(SHAPE, 23, 5, 0), ROPE, QKV, [11, 1, 11]), plain, atol=1e-5, rtol=1e-5)


def test_with_sinks_absolute_positions_would_be_another_model() -> None:
    absolute = reference_attention(ROPE, QKV, lambda p: sorted({*range(min(2, p + 1)), *range(max(0, p - 4), p + 1)}))
    got = passes(WindowCache(SHAPE, 23, 5, 2), ROPE, QKV, [23])
    # the query at 7 is the first whose distance to the sinks is less than in the text: 2 + 5 - 1 = 6 in place of 7
    torch.testing.assert_close(got[:, :7], absolute[:, :7], atol=1e-5, rtol=1e-5)
    assert (got[:, 7:] - absolute[:, 7:]).abs().amax((0, 2, 3)).min() > 1e-3


def test_a_window_over_the_whole_text_equals_the_full_cache() -> None:
    full = passes(FullCache(SHAPE, 23), ROPE, QKV, [23])
    for sinks, window in ((4, 19), (0, 23), (4, 100)):
        got = passes(WindowCache(SHAPE, 23, window, sinks), ROPE, QKV, [8, 1, 1, 13])
        torch.testing.assert_close(got, full, atol=1e-5, rtol=1e-5)


def test_the_models_own_window_applies_if_it_is_shorter() -> None:
    own = shape(layers=2, heads=4, kv_heads=2, head_dim=6, windows=(5, None))
    qkv, rope = tokens(own, 20), Rope(own)
    got = passes(WindowCache(own, 20, 30, 0), rope, qkv, [6, 1, 13])
    torch.testing.assert_close(got, passes(FullCache(own, 20), rope, qkv, [20]), atol=1e-5, rtol=1e-5)
    with pytest.raises(CacheError, match="5 sinks fill the model's own sliding window of 5"):
        WindowCache(own, 20, 30, 5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_outputs_do_not_depend_on_passes_and_crops(data: st.DataObject) -> None:
    window, sinks, undo = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
    whole = passes(WindowCache(SHAPE, 23, window, sinks), ROPE, QKV, [23])
    wrong = tokens(SHAPE, 23, seed=1)
    cache = WindowCache(SHAPE, 23, window, sinks, undo=undo)
    while cache.length < 23:
        at = cache.length
        drafts = data.draw(st.integers(0, min(undo, 23 - at)))
        if drafts:
            passes(cache, ROPE, wrong, [drafts], at)
            cache.crop(at)
        n = data.draw(st.integers(1, 23 - at))
        torch.testing.assert_close(passes(cache, ROPE, QKV, [n], at), whole[:, at : at + n], atol=1e-5, rtol=1e-5)


def test_a_window_cache_reports_how_far_it_can_crop() -> None:
    cache = WindowCache(SHAPE, 100, 6, 2, undo=3)  # 2 + 6 - 1 + 3 = 10 slots
    passes(cache, ROPE, QKV, [10])
    assert cache.can_crop_to(0)  # nothing is overwritten yet
    passes(cache, ROPE, QKV, [4], 10)
    assert [c for c in range(15) if cache.can_crop_to(c)] == [11, 12, 13, 14]
    with pytest.raises(CacheError, match="its 14 tokens cannot be cropped to 10, only by 3"):
        cache.crop(10)
    cache.crop(12)
    assert not cache.can_crop_to(10)  # tokens 13 and 14 have overwritten older ones


def test_memory_does_not_grow_with_the_text() -> None:
    cache = WindowCache(SHAPE, 1000, 6, 2, undo=3)
    passes(cache, ROPE, QKV, [23])
    # by hand: 2 tensors x 2 layers x 2 key heads x 6 channels x 4 bytes x 10 slots
    assert cache.nbytes == 1920 == WindowCache.bytes_for(SHAPE, 1000, 6, 2, undo=3)
    for i in range(5):
        passes(cache, ROPE, QKV, [20], i % 3)
    assert cache.nbytes == 1920 and cache.length == 123
    half = WindowCache(SHAPE, 1000, 6, 2, undo=3, dtype="bfloat16")
    passes(half, ROPE, QKV, [23])
    assert half.nbytes == 960 == WindowCache.bytes_for(SHAPE, 1000, 6, 2, undo=3, dtype="bfloat16")


def test_bfloat16_stays_close_and_does_not_depend_on_the_passes() -> None:
    whole = passes(WindowCache(SHAPE, 23, 5, 2, dtype="bfloat16"), ROPE, QKV, [23])
    assert (whole - streaming_attention(5, 2)).abs().max() < 0.03  # numbers around 1 with 8 bits
    steps = passes(WindowCache(SHAPE, 23, 5, 2, dtype="bfloat16"), ROPE, QKV, [1] * 23)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


def test_impossible_settings_and_a_full_cache_give_a_one_sentence_error() -> None:
    with pytest.raises(CacheError, match="window=0"):
        WindowCache(SHAPE, 10, 0)
    cache = WindowCache(SHAPE, 10, 4)
    with pytest.raises(CacheError, match=r"0 \+ 11 tokens"):
        passes(cache, ROPE, QKV, [11])

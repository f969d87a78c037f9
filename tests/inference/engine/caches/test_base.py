"""Properties of every cache."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from fedtune.inference.engine import aligned
from fedtune.inference.engine.caches import full
from fedtune.inference.engine.caches.base import Cache, CacheError
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.paged import PagedPool
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.rope import Rope
from tests.inference.engine.caches.reference import passes, shape, tokens

SHAPE = shape(layers=2, heads=4, kv_heads=2, head_dim=10)
QKV, ROPE = tokens(SHAPE, 60), Rope(SHAPE)
EACH: dict[str, Callable[[], Cache]] = {
    "full": lambda: FullCache(SHAPE, 60),
    "paged": lambda: PagedPool(SHAPE, 20, 4).cache(60),
    "window": lambda: WindowCache(SHAPE, 60, 6, 2, undo=3),
    "kivi": lambda: KiviCache(SHAPE, 60, 4, residual=6, group=4, undo=3),
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("cuts", [[30], [1] * 30, [17, 2, 11]])
def test_a_cache_can_crop_as_far_as_it_reports(name: str, cuts: list[int]) -> None:
    cache = EACH[name]()
    passes(cache, ROPE, QKV, cuts)
    assert cache.undo == {"full": None, "paged": None}.get(name, 3)
    back = cache.length if cache.undo is None else cache.undo
    assert all(cache.can_crop_to(cache.length - n) for n in range(back + 1))
    if cache.undo is not None:  # such a cache must know the number of guesses
        assert not cache.can_crop_to(0)
    cache.crop(cache.length - back)
    fresh = EACH[name]()
    want = passes(fresh, ROPE, QKV, [30])
    got = passes(cache, ROPE, QKV, [back], 30 - back)
    assert (got - want[:, 30 - back :]).abs().max() < 1e-5


def test_keys_that_cannot_be_quantized_are_refused_again() -> None:
    cache = KiviCache(SHAPE, 60, 4, residual=6, group=4, undo=3)
    passes(cache, ROPE, QKV, [9])
    cache.layers[1].keys[0, 2, 3] = 1e6  # in the second layer: the group of the first is quantized earlier
    for _ in range(2):
        with pytest.raises(CacheError, match="too large for float16"):
            cache.prepare(1)


@pytest.mark.parametrize("fails", range(4))
def test_a_full_cache_without_memory_stays_as_it_was(fails: int) -> None:
    cache, other, calls = FullCache(SHAPE, 200), FullCache(SHAPE, 200), iter(range(9))
    for one in (cache, other):
        passes(one, ROPE, QKV, [50])

    def zeros(*size: Any) -> Any:
        if next(calls) == fails:
            raise MemoryError
        return aligned.zeros(*size)

    with patch.object(full, "zeros", zeros), pytest.raises(MemoryError):
        cache.prepare(20)
    held = [[array.ctypes.data for array in own] for own in (cache.keys, cache.values)]
    assert cache.nbytes == other.nbytes and [list(own) for own in cache._addresses] == held
    for one in (cache, other):
        one.crop(40)
    assert torch.equal(passes(cache, ROPE, QKV, [20], 40), passes(other, ROPE, QKV, [20], 40))

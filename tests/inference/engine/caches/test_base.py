"""Properties of every cache."""

from collections.abc import Callable

import pytest

from fedtune.inference.engine.caches.base import Cache
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
    if cache.undo is not None:  # and not everything: guesses must be counted
        assert not cache.can_crop_to(0)
    cache.crop(cache.length - back)
    fresh = EACH[name]()
    want = passes(fresh, ROPE, QKV, [30])
    got = passes(cache, ROPE, QKV, [back], 30 - back)
    assert (got - want[:, 30 - back :]).abs().max() < 1e-5

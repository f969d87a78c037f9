from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.inference.engine.caches.base import Cache, CacheError
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.paged import PagedCache, PagedPool
from fedtune.inference.engine.caches.prefix import PagedCaches
from fedtune.inference.engine.rope import Rope
from tests.inference.engine.caches.reference import passes, shape, tokens

SHAPE = shape(layers=2, heads=4, kv_heads=2, head_dim=6)
ROPE = Rope(SHAPE)
WORDS = {name: tokens(SHAPE, 9, seed=i) for i, name in enumerate((None, "a", "b"))}  # with an adapter the same ids have other keys


def run(cache: Cache, ids: Sequence[int], adapter: str | None = None) -> torch.Tensor:
    """Attention outputs of the ids that the cache does not hold yet, in one pass."""
    q, k, v = (t[:, list(ids)] for t in WORDS[adapter])
    return passes(cache, ROPE, (q, k, v), [len(ids) - cache.length], cache.length)


def expected(ids: Sequence[int], new: int, adapter: str | None = None) -> torch.Tensor:
    return run(FullCache(SHAPE, 99), ids, adapter)[:, -new:]


def open_cache(caches: PagedCaches, ids: list[int], adapter: str | None = None) -> PagedCache:
    cache = caches.open(ids, adapter)
    assert isinstance(cache, PagedCache)
    return cache


def serve(caches: PagedCaches, ids: list[int], adapter: str | None = None) -> int:
    """Serve one complete request. Returns the number of its cached tokens."""
    cache = open_cache(caches, ids, adapter)
    cached = cache.length
    got = run(cache, ids, adapter)
    torch.testing.assert_close(got, expected(ids, len(ids) - cached, adapter), atol=1e-5, rtol=1e-5)
    caches.close(cache, ids, adapter)
    return cached


def test_requests_share_the_blocks_of_a_common_prefix() -> None:
    caches = PagedCaches(PagedPool(SHAPE, 20, 4))
    assert serve(caches, [1, 2, 3, 4, 5, 6, 7, 8, 1]) == 0
    assert len(caches.tree) == 2 and caches.pool.free == 18
    assert serve(caches, [1, 2, 3, 4, 5, 6, 7, 8, 2, 2]) == 8
    assert serve(caches, [1, 2, 3, 4, 5, 6, 0, 0, 0]) == 6  # two of the second block's four; it is copied before it is written
    assert serve(caches, [1, 2, 3, 4, 5, 6, 7, 8]) == 7  # never all of them
    assert serve(caches, [2, 2, 3, 4, 5]) == 0
    assert serve(caches, [1, 2, 3, 4, 5], "a") == 0
    assert serve(caches, [1, 2, 3, 4, 5], "a") == 4
    caches.tree.clear()
    assert caches.pool.free == 20


def test_two_concurrent_requests_hold_the_same_blocks() -> None:
    caches = PagedCaches(PagedPool(SHAPE, 20, 4))
    serve(caches, [1, 2, 3, 4, 5, 6, 7, 8])
    one, two = open_cache(caches, [1, 2, 3, 4, 5, 6, 7, 8, 1]), open_cache(caches, [1, 2, 3, 4, 5, 6, 7, 8, 2])
    assert one.table[:2] == two.table[:2] and one.table[2] != two.table[2] and caches.pool.holders(one.table[0]) == 3


def test_the_least_recently_used_blocks_are_evicted_first_and_blocks_in_use_stay() -> None:
    caches = PagedCaches(PagedPool(SHAPE, 6, 2))
    serve(caches, [1, 1, 1, 1])
    serve(caches, [2, 2, 2, 2])
    serve(caches, [1, 1, 1, 1, 3])  # now [2, 2, 2, 2] is the older
    held = open_cache(caches, [1, 1, 5])
    assert held.length == 2 and caches.pool.free == 1 and len(caches.tree) == 4
    serve(caches, [4, 4, 4, 4])  # needs one block more than is free: the last block of [2, 2, 2, 2] is evicted
    assert serve(caches, [2, 2, 2, 2, 2]) == 2
    assert serve(caches, [1, 1, 1, 1, 1]) in (2, 4)
    assert caches.open([7] * 12) is None and held.table
    caches.close(held, [1, 1], None)


def test_without_free_blocks_nothing_is_opened_or_lost() -> None:
    caches = PagedCaches(PagedPool(SHAPE, 4, 2))
    one = open_cache(caches, [1, 2, 3, 4, 5])
    assert caches.open([6, 7, 8]) is None and caches.pool.free == 1
    assert caches.reserve(one, 7) and caches.pool.free == 0 and caches.open([6]) is None
    caches.close(one, [])
    assert caches.pool.free == 4
    with pytest.raises(CacheError, match="sequences of 9 tokens do not fit in 4 blocks of 2: use at most 8"):
        PagedCaches(PagedPool(SHAPE, 4, 2), 9)


def test_sequences_with_virtual_tokens_share_nothing() -> None:
    caches = PagedCaches(PagedPool(SHAPE, 9, 2), virtual=2)
    for _ in range(2):
        cache = open_cache(caches, [1, 2, 3])
        assert cache.length == 0 and len(cache.table) == 3
        run(cache, [7, 8, 1, 2, 3])
        caches.close(cache, [1, 2, 3])
    assert caches.pool.free == 9


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_requests_in_any_order_lose_and_mix_up_no_blocks(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 4))
    caches = PagedCaches(PagedPool(SHAPE, 12, size), 12)
    running: list[tuple[PagedCache, list[int], str | None]] = []
    for _ in range(data.draw(st.integers(1, 14))):
        act = data.draw(st.sampled_from(["come", "come", "go", "step"]))
        if act == "come":
            ids = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
            adapter = data.draw(st.sampled_from([None, "a"]))
            cache = caches.open(ids, adapter)
            if cache is None:
                assert running
                continue
            assert isinstance(cache, PagedCache) and cache.length < len(ids)
            cached = cache.length
            torch.testing.assert_close(run(cache, ids, adapter), expected(ids, len(ids) - cached, adapter), atol=1e-5, rtol=1e-5)
            running.append((cache, ids, adapter))
        elif running and act == "go":
            caches.close(*running.pop(data.draw(st.integers(0, len(running) - 1))))
        elif running:
            cache, ids, adapter = data.draw(st.sampled_from(running))
            if len(ids) < 12 and caches.reserve(cache, 1):
                ids.append(data.draw(st.integers(0, 1)))
                torch.testing.assert_close(run(cache, ids, adapter), expected(ids, 1, adapter), atol=1e-5, rtol=1e-5)
        held = [block for cache, *_ in running for block in cache.table]
        own = [node.block for node in caches.tree._nodes]
        assert len(set(own)) == len(own) and caches.pool.free == 12 - len({*held, *own})
        assert all(caches.pool.holders(b) == (held + own).count(b) for b in range(1, 13))
        nodes = list(caches.tree._nodes)
        for i, node in enumerate(nodes):  # `evict` relies on this
            parent = node.parent
            if parent is not None and parent.parent is not None:
                assert parent in nodes[i:]
                assert caches.pool.holders(node.block) == 1 or caches.pool.holders(parent.block) > 1
    for cache, ids, adapter in running:
        caches.close(cache, ids, adapter)
    caches.tree.evict(12)
    assert caches.pool.free == 12

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedtune.inference.engine.caches.base import Cache, CacheError, Span
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.paged import OutOfBlocks, PagedCache, PagedPool
from fedtune.inference.engine.reference.attention import attend
from fedtune.inference.engine.rope import Rope
from tests.inference.engine.caches.reference import passes, shape, tokens

SHAPE = shape(layers=2, heads=6, kv_heads=2, head_dim=10)
QKV = tokens(SHAPE, 40)
ROPE = Rope(SHAPE)


def together(spans: list[Span], rope: Rope, rows: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """One pass of all spans: rows holds each span's q, k, v [layers, n, ., D]."""
    for kind in {type(span.cache) for span in spans}:
        kind.prepare_all([span for span in spans if type(span.cache) is kind])
    out = []
    for span, (q, k, v) in zip(spans, rows, strict=True):
        out.append(torch.stack([attend(span.cache, i, q[i], k[i], v[i], rope) for i in range(q.shape[0])]))
        span.cache.advance(span.n)
    return torch.cat(out, 1)


def rows_of(seed: int, n: int, of: Any = SHAPE) -> tuple[torch.Tensor, ...]:
    return tokens(of, n, seed)


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("cuts", [[40], [1] * 40, [13, 1, 1, 4, 21]])
def test_one_sequence_equals_the_full_cache(block: int, cuts: list[int]) -> None:
    pool = PagedPool(SHAPE, 64 // block + 2, block)
    got = passes(pool.cache(), ROPE, QKV, cuts)
    torch.testing.assert_close(got, passes(FullCache(SHAPE, 40), ROPE, QKV, [40]), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_in_a_mixed_pass_each_sequence_has_the_outputs_of_its_own_pass(data: st.DataObject) -> None:
    own = shape(layers=2, heads=6, kv_heads=3, head_dim=4, windows=data.draw(st.sampled_from([(None, None), (5, None), (3, 9)])))
    rope, pool = Rope(own), PagedPool(own, 200, data.draw(st.integers(1, 7)))
    mine: list[Cache] = []
    alone: list[Cache] = []
    for i in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(0, 30))
        mine.append(pool.cache())
        alone.append(FullCache(own, 60))
        if n:
            for cache in (mine[-1], alone[-1]):
                passes(cache, rope, tokens(own, n, seed=i), [n])
    for step in range(2):
        counts = [data.draw(st.sampled_from([1, 1, 1, 2, 5])) for _ in mine]
        rows = [rows_of(100 + 10 * step + i, n, own) for i, n in enumerate(counts)]
        got = together([Span(cache, n) for cache, n in zip(mine, counts, strict=True)], rope, rows)
        want = together([Span(cache, n) for cache, n in zip(alone, counts, strict=True)], rope, rows)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_32_sequences_of_all_lengths_decode_like_single_ones() -> None:
    pool = PagedPool(SHAPE, 400, 16)
    mine: list[PagedCache] = [pool.cache() for _ in range(32)]
    alone = [FullCache(SHAPE, 400) for _ in range(32)]
    for i, (one, other) in enumerate(zip(mine, alone, strict=True)):
        n = 1 + 4 * i if i < 30 else 150 + i  # 1 .. 117, 180, 181
        passes(one, ROPE, tokens(SHAPE, n, i), [n])
        passes(other, ROPE, tokens(SHAPE, n, i), [n])
    rows = [rows_of(i, 1) for i in range(32)]
    got = together([Span(cache, 1) for cache in mine], ROPE, rows)
    torch.testing.assert_close(got, together([Span(cache, 1) for cache in alone], ROPE, rows), atol=1e-5, rtol=1e-5)


def test_values_of_a_closed_sequence_reach_no_other() -> None:
    pool = PagedPool(SHAPE, 4, 4)
    broken = pool.cache()
    passes(broken, ROPE, tuple(torch.full_like(t, torch.nan) for t in QKV), [16])  # type: ignore[arg-type]
    broken.free()
    got = passes(pool.cache(), ROPE, QKV, [5, 1])
    torch.testing.assert_close(got, passes(FullCache(SHAPE, 40), ROPE, QKV, [6]), atol=1e-5, rtol=1e-5)


def test_non_finite_values_of_one_sequence_reach_no_other() -> None:
    pool = PagedPool(SHAPE, 20, 4)
    good, broken = pool.cache(), pool.cache()
    passes(good, ROPE, QKV, [3])
    nan = [torch.full_like(t, torch.nan) for t in rows_of(0, 9)]
    passes(broken, ROPE, (nan[0], nan[1], nan[2]), [9])
    got = together([Span(good, 1), Span(broken, 1)], ROPE, [tuple(t[:, 3:4] for t in QKV), tuple(t[:, :1] for t in nan)])
    torch.testing.assert_close(got[:, :1], passes(FullCache(SHAPE, 40), ROPE, QKV, [4])[:, 3:], atol=1e-5, rtol=1e-5)


def twin(cache: PagedCache) -> PagedCache:
    """Another sequence with the same tokens, which shares all blocks."""
    other = cache.pool.cache()
    other.hold(cache.table, cache.length)
    return other


def test_sequences_share_blocks_until_one_writes() -> None:
    pool = PagedPool(SHAPE, 10, 4)
    one = pool.cache()
    passes(one, ROPE, QKV, [10])  # blocks of 4, 4 and 2 tokens
    two = twin(one)
    assert pool.free == 7 and two.table == one.table
    other = tuple(torch.cat([a[:, :10], b[:, 10:]], 1) for a, b in zip(QKV, tokens(SHAPE, 40, 1), strict=True))
    passes(two, ROPE, other, [1], 10)  # type: ignore[arg-type]
    assert pool.free == 6 and two.table[:2] == one.table[:2] and two.table[2] != one.table[2]
    for cache, qkv in ((one, QKV), (two, other)):
        want = passes(FullCache(SHAPE, 40), ROPE, qkv, [20])  # type: ignore[arg-type]
        at = cache.length
        got = passes(cache, ROPE, qkv, [20 - at], at)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want[:, at:], atol=1e-5, rtol=1e-5)
    one.free()
    two.free()
    assert pool.free == 10


def test_a_crop_releases_blocks_and_does_not_change_the_twin() -> None:
    pool = PagedPool(SHAPE, 10, 4)
    one = pool.cache()
    passes(one, ROPE, QKV, [10])
    two = twin(one)
    two.crop(5)
    assert len(two.table) == 2 and pool.free == 7
    wrong = tokens(SHAPE, 40, 1)
    passes(two, ROPE, wrong, [3], 5)  # writes into a copy of the block
    want = passes(FullCache(SHAPE, 40), ROPE, QKV, [20])
    torch.testing.assert_close(passes(one, ROPE, QKV, [10], 10), want[:, 10:], atol=1e-5, rtol=1e-5)


def test_too_few_blocks_are_reported_before_any_change() -> None:
    pool = PagedPool(SHAPE, 4, 4)
    one, two = pool.cache(), pool.cache()
    passes(one, ROPE, QKV, [8])
    passes(two, ROPE, QKV, [7])  # 4 blocks; `two` has space for 1 token
    tables = [list(one.table), list(two.table)]
    assert (one.needs(1), two.needs(1), two.needs(2)) == (1, 0, 1)
    with pytest.raises(OutOfBlocks, match="a pass needs 1 blocks and 0 of the pool's 4 are free"):
        together([Span(two, 1), Span(one, 1)], ROPE, [rows_of(0, 1), rows_of(1, 1)])
    with pytest.raises(OutOfBlocks, match="1 blocks are needed and 0 of the pool's 4"):
        one.reserve(1)
    assert [one.table, two.table] == tables and (one.length, two.length) == (8, 7)
    got = passes(two, ROPE, QKV, [1], 7)
    torch.testing.assert_close(got, passes(FullCache(SHAPE, 40), ROPE, QKV, [8])[:, 7:], atol=1e-5, rtol=1e-5)
    one.free()
    passes(two, ROPE, QKV, [8], 8)
    with pytest.raises(CacheError, match="exceed the cache's limit of 16"):
        two.reserve(1)


def test_pools_and_kinds_may_be_mixed_in_a_pass() -> None:
    caches: list[Cache] = [PagedPool(SHAPE, 4, 4).cache(), PagedPool(SHAPE, 4, 3).cache(), FullCache(SHAPE, 9)]
    rows = [rows_of(i, n) for i, n in enumerate((2, 5, 1))]
    want = torch.cat([passes(FullCache(SHAPE, 9), ROPE, row, [row[0].shape[1]]) for row in rows], 1)  # type: ignore[arg-type]
    got = together([Span(cache, row[0].shape[1]) for cache, row in zip(caches[:2], rows, strict=False)], ROPE, rows[:2])
    torch.testing.assert_close(got, want[:, :7], atol=1e-5, rtol=1e-5)
    for cache in caches[:2]:
        cache.crop(0)
    got = together([Span(cache, row[0].shape[1]) for cache, row in zip(caches, rows, strict=True)], ROPE, rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_bytes_by_hand() -> None:
    pool = PagedPool(SHAPE, 5, 4)
    # keys and values, 2 layers, 6 blocks with the empty one, 4 tokens, 2 key heads, 10 channels, 4 bytes
    assert pool.nbytes == 2 * 2 * 6 * 4 * 2 * 10 * 4 == PagedPool.bytes_for(SHAPE, 5, 4)
    cache = pool.cache()
    passes(cache, ROPE, QKV, [5])
    assert cache.nbytes == 2 * 2 * 2 * 4 * 2 * 10 * 4
    assert PagedPool(SHAPE, 5, 4, "bfloat16").nbytes == pool.nbytes // 2


def test_bfloat16_stays_close() -> None:
    pool = PagedPool(SHAPE, 10, 4, "bfloat16")
    got = passes(pool.cache(), ROPE, QKV, [20, 1, 19])
    assert got.dtype == torch.float32
    assert (got - passes(FullCache(SHAPE, 40), ROPE, QKV, [40])).abs().max() < 0.05


@pytest.mark.parametrize("numbers", [(0, 4), (4, 0)])
def test_an_empty_pool_is_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(CacheError, match="must be at least 1"):
        PagedPool(SHAPE, *numbers)


class Life(RuleBasedStateMachine):
    """Sequences begin, grow together, fork, are cropped and end; each equals the full cache on its own text, and no block is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagedPool(SHAPE, 14, 3)
        self.alive: list[tuple[PagedCache, list[int]]] = []
        self.tokens = tokens(SHAPE, 8, seed=5)  # a vocabulary of 8

    def rows(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (t[:, ids] for t in self.tokens)
        return q, k, v

    @initialize()
    def begin(self) -> None:
        self.join()

    @rule()
    def join(self) -> None:
        self.alive.append((self.pool.cache(), []))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(range(len(self.alive))), min_size=1, max_size=4, unique=True))
        new = [data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=5)) for _ in chosen]
        spans = [Span(self.alive[i][0], len(ids)) for i, ids in zip(chosen, new, strict=True)]
        before = [list(cache.table) for cache, _ in self.alive]
        try:
            got = together(spans, ROPE, [self.rows(ids) for ids in new])
        except OutOfBlocks:
            assert sum(self.alive[i][0].needs(len(ids)) for i, ids in zip(chosen, new, strict=True)) > self.pool.free
            assert [cache.table for cache, _ in self.alive] == before
            return
        except CacheError:
            return
        at = 0
        for i, ids in zip(chosen, new, strict=True):
            text = self.alive[i][1]
            text += ids
            want = passes(FullCache(SHAPE, 64), ROPE, self.rows(text), [len(text)])[:, -len(ids) :]
            torch.testing.assert_close(got[:, at : at + len(ids)], want, atol=1e-5, rtol=1e-5)
            at += len(ids)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        cache, text = data.draw(st.sampled_from(self.alive))
        length = data.draw(st.integers(0, len(text)))
        cache.crop(length)
        del text[length:]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        cache, text = data.draw(st.sampled_from(self.alive))
        self.alive.append((twin(cache), list(text)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        cache, _ = self.alive.pop(data.draw(st.integers(0, len(self.alive) - 1)))
        cache.free()

    @invariant()
    def every_block_is_free_or_in_a_table(self) -> None:
        held = [block for cache, _ in self.alive for block in cache.table]
        assert all(self.pool.holders(block) == held.count(block) for block in range(1, 15))
        assert self.pool.free == 14 - len(set(held)) and 0 not in held
        assert all(len(cache.table) >= -(-cache.length // 3) for cache, _ in self.alive)
        assert [cache.length for cache, _ in self.alive] == [len(text) for _, text in self.alive]

    def teardown(self) -> None:
        for cache, _ in self.alive:
            cache.free()
        assert self.pool.free == 14


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)

"""Passes in native code against torch's, on the same linear layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import to_bfloat16
from fedtune.inference.engine.caches.base import Cache, CacheError, Span
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.paged import OutOfBlocks, PagedPool
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.decoder import Decoder, describe_passes
from fedtune.inference.engine.layer import make_layer
from fedtune.inference.engine.layout import linears
from fedtune.inference.engine.linear import Linear, portable
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.native.library import SETS, kernels
from fedtune.inference.engine.native.structures import SpanStructure
from fedtune.inference.engine.shape import RopeShape, Shape
from fedtune.inference.engine.step import NativeStep
from tests.inference.engine.native.test_kernels import kernels_of
from tests.inference.engine.tiny import SHAPES, VOCAB, tiny_model

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs the native kernels")
Make = Callable[[Shape], Callable[[], Cache]]
Floats = NDArray[np.float32]


def paged(dtype: str = "float32") -> Make:
    def make(shape: Shape) -> Callable[[], Cache]:
        pool = PagedPool(shape, 200, 3, dtype)
        pool.take(2)  # so that no sequence begins with the first block
        return pool.cache

    return make


CACHES: dict[str, Make] = {
    "full": lambda shape: lambda: FullCache(shape, 100),
    "full bf16": lambda shape: lambda: FullCache(shape, 100, "bfloat16"),
    "paged": paged(),
    "paged bf16": paged("bfloat16"),
    "window": lambda shape: lambda: WindowCache(shape, 200, 37, 5, undo=20),
    "window bf16": lambda shape: lambda: WindowCache(shape, 200, 40, 33, undo=20, dtype="bfloat16"),
    "window alone": lambda shape: lambda: WindowCache(shape, 200, 9, 0, undo=20),
    "8 bits": lambda shape: lambda: KiviCache(shape, 200, 8, residual=30, undo=20),
    "4 bits": lambda shape: lambda: KiviCache(shape, 200, 4, residual=21, undo=20, group=6),
    "2 bits bf16": lambda shape: lambda: KiviCache(shape, 200, 2, residual=40, undo=20, dtype="bfloat16"),
}
EXACT = ("full", "full bf16", "paged", "paged bf16")  # every row's arithmetic is the same however a text is split


def native_engine(name: str, folder: Path, kind: str = "bf16", instructions: str = "") -> Engine:
    tiny_model(name, folder)
    with patch.dict("os.environ", {"FEDTUNE_NATIVE": instructions or kernels().instructions}):  # pyright: ignore[reportOptionalMemberAccess]
        engine = load_engine(folder, kind, keep=False)
    assert engine.decoder.native_step() is not None
    return engine


@contextmanager
def by_torch(decoder: Decoder) -> Iterator[None]:
    with patch.object(decoder, "native_step", lambda: None):
        yield


def some_ids(bound: int, size: int | tuple[int, int], seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(bound, size=size)


def texts(count: int, length: int) -> list[NDArray[np.int64]]:
    return list(some_ids(VOCAB, (count, length), 7))


def pass_logits(decoder: Decoder, make: Callable[[], Cache]) -> Floats:
    """Logits of passes of every form: a prefill, two sequences of different lengths, decoding, several rows, after a crop."""
    first, second = make(), make()
    a, b = texts(2, 60)
    out = [decoder.forward(a[:21], [Span(first, 21, keep=None)])]
    out.append(decoder.forward([*b[:9], a[21]], [Span(second, 9, keep=2), Span(first, 1)]))
    for i in range(22, 26):
        out.append(decoder.forward([a[i], b[i - 13]], [Span(first, 1), Span(second, 1)]))
    first.crop(20)
    out.append(decoder.forward(a[20:37], [Span(first, 17, keep=None)]))
    out.append(decoder.forward(a[37:38], [Span(first, 1)]))
    return np.concatenate(out)


def assert_alike(found: Floats, wanted: Floats) -> None:
    """Equal but for rounding: where sums differ in the last bit, an activation may be rounded to another code, which later rows see."""
    off = np.abs(found - wanted) / np.abs(wanted).max()
    assert np.median(off[0]) < 1e-6 and np.median(off) < 1e-3 and off.max() < 0.2, (np.median(off[0]), np.median(off), off.max())


@pytest.mark.parametrize("cache", ["full", "paged"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_architecture_gives_torchs_logits(name: str, cache: str, tmp_path: Path) -> None:
    decoder = native_engine(name, tmp_path).decoder
    found = pass_logits(decoder, CACHES[cache](decoder.shape))
    with by_torch(decoder):
        wanted = pass_logits(decoder, CACHES[cache](decoder.shape))
    assert_alike(found, wanted)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_every_instruction_set_and_kind(name: str, kind: str, instructions: str, tmp_path: Path) -> None:
    kernels_of(instructions)
    decoder = native_engine(name, tmp_path, kind, instructions).decoder
    found = pass_logits(decoder, CACHES["full"](decoder.shape))
    with by_torch(decoder):
        assert_alike(found, pass_logits(decoder, CACHES["full"](decoder.shape)))


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("cache", ["full bf16", "paged bf16"])
def test_entries_of_16_bits_lose_no_more_than_their_rounding(cache: str, instructions: str, tmp_path: Path) -> None:
    kernels_of(instructions)
    decoder = native_engine("qwen3_biases", tmp_path, "bf16", instructions).decoder
    found, exact = (pass_logits(decoder, CACHES[name](decoder.shape)) for name in (cache, "full"))
    off = np.abs(found - exact) / np.abs(exact).max()
    assert 1e-4 < np.median(off) < 5e-3 and off.max() < 0.06, (np.median(off), off.max())


def test_entries_of_16_bits_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path).decoder
    caches = [FullCache(decoder.shape, 20, dtype) for dtype in ("float32", "bfloat16")]
    for cache in caches:
        decoder.forward(texts(1, 20)[0], [Span(cache, 20)])
    for exact, short in ((one[0], other[0]) for one, other in zip(*((c.keys, c.values) for c in caches), strict=True)):
        assert np.array_equal(to_bfloat16(exact), short)


def decoder_of(
    hidden: int, heads: int, kv_heads: int, width: int, inner: int, window: int | None = None, gain: float = 1.0, count: int = 2
) -> Decoder:
    """A random int8 decoder of `count` layers with any sizes; `gain` multiplies the weights of qkv, gate and up."""
    shape = Shape(
        family="llama", hidden=hidden, layers=count, heads=heads, kv_heads=kv_heads, head_dim=width, intermediate=inner, vocab=37, eps=1e-6,
        context=4096, tied=False, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, windows=(window, None)[:count],
        rope=RopeShape(), bos=None, eos=(),
    )  # fmt: skip
    draws = np.random.default_rng(0)

    def linear(rows: int, columns: int) -> Linear:
        weight = draws.standard_normal((rows, columns), np.float32) * np.float32((gain if rows > hidden else 1.0) / columns**0.5)
        return linear_from_tensors("int8", portable("int8", weight), n_in=columns)

    layers = [
        make_layer(
            shape,
            {name: linear(sum(part.rows for part in fused.parts), fused.columns) for name, fused in linears(shape).items()},
            lambda name: 1 + np.float32(0.1) * draws.standard_normal(hidden, np.float32),
        )
        for _ in range(count)
    ]
    embed = draws.standard_normal((37, hidden), np.float32)
    return Decoder(shape, embed, layers, np.ones(hidden, np.float32), linear(37, hidden))


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "width", "inner"),
    [(33, 1, 1, 4, 7), (64, 3, 1, 64, 100), (40, 2, 2, 128, 31), (96, 4, 2, 80, 65), (35, 5, 5, 22, 96), (32, 2, 1, 512, 32)],
)
@pytest.mark.parametrize("window", [None, 45])
def test_awkward_sizes_over_several_tiles(hidden: int, heads: int, kv_heads: int, width: int, inner: int, window: int | None) -> None:
    decoder = decoder_of(hidden, heads, kv_heads, width, inner, window)
    ids = some_ids(37, 150, 1)
    found = []
    for native in (True, False):
        with patch.object(decoder, "native_step", decoder.native_step if native else lambda: None):
            cache = FullCache(decoder.shape, 150)
            parts = [decoder.forward(part, [Span(cache, len(part), keep=None)]) for part in np.split(ids, [64, 65, 135])]
        found.append(np.concatenate(parts))
    assert_alike(*found)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("cache", EXACT)
def test_a_row_does_not_depend_on_how_a_text_is_split_or_on_other_sequences(cache: str, instructions: str) -> None:
    kernels_of(instructions)
    with patch.dict("os.environ", {"FEDTUNE_NATIVE": instructions}):
        decoder = decoder_of(48, 6, 2, 12, 80, window=45)
    a, b = some_ids(37, (2, 100), 7)
    make = CACHES[cache](decoder.shape)
    alone = make()
    wanted = np.concatenate([decoder.forward([token], [Span(alone, 1)]) for token in a])
    whole = decoder.forward(a, [Span(make(), 100, keep=None)])
    assert np.array_equal(whole, wanted)
    one, other, found = make(), make(), []
    at = 0
    for n in (31, 1, 8, 17, 43):
        spans = [Span(other, 1), Span(one, n, keep=None)] if n % 2 else [Span(one, n, keep=None)]
        logits = decoder.forward([*b[at : at + n % 2], *a[at : at + n]], spans)
        found.append(logits[-n:])
        at += n
    assert np.array_equal(np.concatenate(found), wanted)
    torch.set_num_threads(3)  # the fixture of all tests sets it back
    assert np.array_equal(decoder.forward(a, [Span(make(), 100, keep=None)]), wanted)


def test_an_early_exit_continues_where_it_ended(tmp_path: Path) -> None:
    decoder = native_engine("qwen3", tmp_path).decoder
    (a,) = texts(1, 12)
    whole = decoder.forward(a, [Span(FullCache(decoder.shape, 20), 12, keep=None)])
    cache = FullCache(decoder.shape, 20)
    begun = decoder.embed(a)
    before = begun.copy()
    hidden = decoder.run(begun, [Span(cache, 12)], last=2)
    assert np.array_equal(begun, before) and cache.length == 12
    assert np.array_equal(decoder.logits(hidden), decoder.forward(a, [Span(FullCache(decoder.shape, 20), 12, keep=None)], layers=2))
    cache.crop(0)
    assert np.array_equal(decoder.logits(decoder.run(hidden, [Span(cache, 12)], first=2)), whole)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("window", [None, 39])
@pytest.mark.parametrize("cache", [name for name in CACHES if name not in EXACT])
def test_windows_and_codes_are_read_as_torch_reads_them(cache: str, window: int | None, instructions: str) -> None:
    kernels_of(instructions)
    with patch.dict("os.environ", {"FEDTUNE_NATIVE": instructions}):
        decoder = decoder_of(48, 6, 2, 40, 80, window, count=1)  # one layer, so that a difference of rounding does not grow
    ids = some_ids(37, 150, 3)
    found = []
    for native in (True, False):
        with patch.object(decoder, "native_step", decoder.native_step if native else lambda: None):
            one, parts, at = CACHES[cache](decoder.shape)(), list[Floats](), 0
            for n in (7, 1, 20, 1, 1, 13, 1, 30, *(1,) * 40, 9, 2, 5, 1, 17):
                parts.append(decoder.run(decoder.embed(ids[at : at + n]), [Span(one, n)]))
                at += n
                if n in (9, 13):
                    one.crop(at := at - 8)
            found.append(np.concatenate(parts))
    off = np.abs(found[0] - found[1]) / np.abs(found[1]).max()
    assert np.quantile(off, 0.97) < 1e-6 and off.max() < 0.01, (np.quantile(off, 0.97), off.max())


@pytest.mark.parametrize("cache", [name for name in CACHES if name not in EXACT])
def test_a_text_too_long_for_one_pass_runs_as_several(cache: str) -> None:
    decoder = decoder_of(48, 6, 2, 40, 80, 45)
    make, ids = CACHES[cache](decoder.shape), some_ids(37, 120, 3)
    one, other = make(), make()
    runs = list[int]()

    def count_passes(self: NativeStep, hidden: Floats, *args: Any, **more: Any) -> Any:
        runs.append(len(hidden))
        return RUN(self, hidden, *args, **more)

    with patch.object(NativeStep, "run", count_passes):
        whole = decoder.run(decoder.embed(ids), [Span(one, 120)])
    parts, at = list[Floats](), 0
    for n in runs:
        assert other.most(120 - at) == n
        parts.append(decoder.run(decoder.embed(ids[at : at + n]), [Span(other, n)]))
        at += n
    assert len(runs) > 1 and at == 120 and np.array_equal(whole, np.concatenate(parts))
    # with another sequence, which keeps the rows of two tokens
    mixed = decoder.forward([*ids, *ids[:5]], [Span(make(), 120, keep=3), Span(make(), 5, keep=2)])
    assert np.array_equal(mixed, decoder.logits(np.concatenate([whole[-3:], whole[3:5]])))
    # a text that does not fit changes nothing
    before = one.length
    with pytest.raises(CacheError, match="exceed the cache's limit of 200"):
        decoder.forward([*ids[:5], *ids], [Span(other, 5), Span(one, 120)])
    assert (one.length, other.length) == (before, 120)


RUN = NativeStep.run


def test_caches_of_different_kinds_share_a_native_pass(tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path).decoder
    caches, ids = [make(decoder.shape)() for make in CACHES.values()], some_ids(VOCAB, 7 * len(CACHES), 5)
    found = decoder.forward(ids, [Span(cache, 7, keep=None) for cache in caches])
    for part, at, make in zip(np.split(found, len(CACHES)), range(0, len(ids), 7), CACHES.values(), strict=True):
        assert np.array_equal(part, decoder.forward(ids[at : at + 7], [Span(make(decoder.shape)(), 7, keep=None)]))


def test_large_scores_and_gates_stay_exact() -> None:
    decoder, found, ids = decoder_of(32, 4, 2, 16, 64, gain=100.0), list[Floats](), some_ids(37, 50, 1)
    for native in (True, False):
        with patch.object(decoder, "native_step", decoder.native_step if native else lambda: None):
            found.append(decoder.run(decoder.embed(ids), [Span(FullCache(decoder.shape, 50), 50)], last=1))
    assert np.isfinite(found[0]).all()
    assert_alike(*found)


def test_a_full_cache_is_refused_before_anything_changes(tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path).decoder
    full, free = FullCache(decoder.shape, 5), FullCache(decoder.shape, 9)
    with pytest.raises(CacheError, match="exceed the cache's limit of 5"):
        decoder.forward(range(10), [Span(free, 4), Span(full, 6)])
    assert free.length == full.length == 0 and free.nbytes == 0
    pool = PagedPool(decoder.shape, 2, 4)
    a, b = pool.cache(), pool.cache()
    with pytest.raises(OutOfBlocks):
        decoder.forward(range(9), [Span(a, 4), Span(b, 5)])
    assert pool.free == 2 and not a.table and not b.table


def test_non_finite_numbers_affect_only_their_sequence(tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path, "int8").decoder
    caches = [FullCache(decoder.shape, 9) for _ in range(2)]
    hidden = np.random.default_rng(0).standard_normal((6, decoder.shape.hidden), np.float32)
    wanted = decoder.forward(None, [Span(FullCache(decoder.shape, 9), 3, keep=None)], embeds=hidden[3:])
    hidden[1, 5] = np.inf
    logits = decoder.forward(None, [Span(cache, 3, keep=None) for cache in caches], embeds=hidden)
    assert not np.isfinite(logits[1:3]).any() and np.array_equal(logits[3:], wanted)


def test_the_reason_why_torch_runs_a_pass_is_stated(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    with patch.dict("os.environ", {"FEDTUNE_NATIVE": "off"}):
        plain = load_engine(tmp_path, "fp32", keep=False).decoder
    assert plain.native_step() is None and describe_passes(plain) == "by torch (fp32 linear layers are not native)"
    decoder = native_engine("llama", tmp_path).decoder
    assert describe_passes(decoder) == "in native code"
    decoder.layers[1].down = plain.layers[1].down  # an exchanged linear is detected
    assert decoder.native_step() is None


Change = Callable[[SpanStructure], None]


def put(name: str, value: int) -> Change:
    return lambda span: setattr(span, name, value)


BAD: Sequence[Change] = [
    put("rows", 0), put("rows", 5), put("rows", 2**62), put("length", -1), put("length", 61), put("length", 2**62),
    put("keys", 0), put("values", 0), put("entries", 100), put("entries", -1), put("token_stride", 3),
    put("token_stride", 2**62), put("head_stride", 2**62), put("head_stride", -1),
]  # fmt: skip


def prepare(cache: Cache) -> Cache:
    cache.prepare(4)
    return cache


def run_four(decoder: Decoder, cache: Cache, first: int = 0, last: int = 3, kept: Sequence[int] = ()) -> None:
    """Run four rows of zeros, without the checks of the decoder."""
    step, turns = decoder.native_step(), [rope.rows(0, 4) for rope in dict.fromkeys(decoder.ropes)]
    assert step is not None
    with patch.object(step, "_turns", lambda places: turns):  # rows of a wrong number or place have none
        step.run(np.zeros((4, decoder.shape.hidden), np.float32), [Span(cache, 4)], [None], first=first, last=last, kept=kept)


@pytest.mark.parametrize("change", BAD)
@pytest.mark.parametrize("cache", ["full", "paged"])
def test_spans_that_do_not_fit_are_refused(cache: str, change: Change, tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path).decoder
    one = prepare(CACHES[cache](decoder.shape)())
    run_four(decoder, one)
    place = one.native_span(4)
    change(place)
    with patch.object(one, "native_span", lambda n: place), pytest.raises(ModelError, match="do not fit each other"):
        run_four(decoder, one)


@pytest.mark.parametrize("change", [put("block", 0), put("block", 2**40), put("block_count", 1), put("block", -3)])
def test_tables_that_do_not_fit_are_refused(change: Change, tmp_path: Path) -> None:
    test_spans_that_do_not_fit_are_refused("paged", change, tmp_path)


@pytest.mark.parametrize("slot", [-1, 201, 2**30])
def test_blocks_outside_the_pool_are_refused(slot: int, tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path).decoder
    one: Any = prepare(CACHES["paged"](decoder.shape)())
    run_four(decoder, one)
    one.table[1] = slot
    with pytest.raises(ModelError, match="do not fit each other"):
        run_four(decoder, one)


@pytest.mark.parametrize(("first", "last", "kept"), [(-1, 3, ()), (2, 1, ()), (0, 4, ()), (0, 3, (4,)), (0, 3, (-1,)), (0, 3, (0,) * 5)])
def test_layers_and_rows_out_of_range_are_refused(first: int, last: int, kept: tuple[int, ...], tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path).decoder
    with pytest.raises(ModelError, match="do not fit each other"):
        run_four(decoder, prepare(FullCache(decoder.shape, 9)), first, last, kept)

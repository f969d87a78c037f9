"""Separate adapters in native passes against torch's, on the same linear layers and factors."""

import ctypes
import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.decoder import Decoder
from fedtune.inference.engine.layout import linears
from fedtune.inference.engine.lora import make_lora
from fedtune.inference.engine.native.library import SETS, kernels
from fedtune.inference.engine.native.structures import LoraPiece, LoraStructure
from tests.inference.engine.native.test_kernels import kernels_of
from tests.inference.engine.native.test_step import CACHES, EXACT, by_torch, decoder_of, native_engine, texts
from tests.inference.engine.tiny import SHAPES

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs the native kernels")
Factors = dict[str, tuple[Any, Any]]


def factors(decoder: Decoder, seed: int, ranks: Sequence[int], layers: Sequence[int] | None = None, only: str = "") -> Factors:
    """Random factors for the modules whose names contain `only`; the ranks take turns."""
    draws, out = torch.Generator().manual_seed(seed), Factors()
    for layer in range(decoder.shape.layers) if layers is None else layers:
        for fused in linears(decoder.shape).values():
            for part in fused.parts:
                if only in part.module:
                    rank = ranks[len(out) % len(ranks)]
                    a, b = torch.randn(rank, fused.columns, generator=draws), torch.randn(part.rows, rank, generator=draws)
                    out[f"model.layers.{layer}.{part.module}"] = (a * fused.columns**-0.5).numpy(), (b * 0.5 * rank**-0.5).numpy()
    return out


def adapt(decoder: Decoder, **changes: Factors) -> Decoder:
    decoder.adapters |= {name: make_lora(decoder.shape, change, name) for name, change in changes.items()}
    return decoder


def adapt_all(decoder: Decoder) -> Decoder:
    """With an adapter on all linears, one on the values of the last layer, and one that changes nothing."""
    last = [decoder.shape.layers - 1]
    return adapt(decoder, wide=factors(decoder, 1, (17, 3, 1)), narrow=factors(decoder, 2, (5, 16), last, "v_proj"), none={})


def forward(decoder: Decoder, ids: Tensor | None, spans: Sequence[Span], *, embeds: Tensor | None = None) -> Tensor:
    arrays = (None if x is None else x.numpy() for x in (ids, embeds))
    return torch.from_numpy(decoder.forward(next(arrays), spans, embeds=next(arrays)))


def run(decoder: Decoder, hidden: Tensor, spans: Sequence[Span], **layers: int) -> Tensor:
    return torch.from_numpy(decoder.run(hidden.numpy(), spans, **layers))


def both(decoder: Decoder, measured: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of native code and of torch."""
    with patch("fedtune.inference.engine.reference.passes.run_layers", side_effect=AssertionError("a pass ran by torch")):
        found = measured()
    with by_torch(decoder):
        return found, measured()


def pass_logits(decoder: Decoder, make: Callable[[], Cache]) -> Tensor:
    """Logits of passes in which each sequence has its adapter or none: prefills, decoding, several rows, after a crop."""
    names = "wide", None, "narrow", "wide", "wide", "none"
    caches, ids = [make() for _ in names], [torch.from_numpy(text) for text in texts(len(names), 40)]
    ends, out = [0] * len(names), []
    for counts in ((11, 1, 9, 2, 7, 3), (1,) * 6, (1,) * 6, (0, 3, 4, 0, 17, 1), (0, 0, 1, 1, 0, 0), (1, 0, 0, 0, 0, 0)):
        spans = [Span(caches[i], n, keep=None, adapter=names[i]) for i, n in enumerate(counts) if n]
        out.append(forward(decoder, torch.cat([ids[i][ends[i] : ends[i] + n] for i, n in enumerate(counts)]), spans))
        ends = [end + n for end, n in zip(ends, counts, strict=True)]
    caches[0].crop(8)
    out.append(forward(decoder, ids[0][8:20], [Span(caches[0], 12, keep=None, adapter="wide")]))
    return torch.cat(out)


@pytest.mark.parametrize("name", SHAPES)
def test_every_architecture_gives_torchs_logits(name: str, tmp_path: Path) -> None:
    decoder = adapt_all(native_engine(name, tmp_path, "fp32").decoder)
    found, expected = both(decoder, lambda: pass_logits(decoder, CACHES["full"](decoder.shape)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_every_instruction_set_and_kind(name: str, kind: str, instructions: str, tmp_path: Path) -> None:
    kernels_of(instructions)
    decoder = adapt_all(native_engine(name, tmp_path, kind, instructions).decoder)
    found, expected = both(decoder, lambda: pass_logits(decoder, CACHES["paged"](decoder.shape)))
    off = ((found - expected).abs() / expected.abs().max()).amax(1)
    # in some rows an activation is rounded to another code, which later rows see
    assert off.min() < 1e-5 and off.median() < (1e-5 if kind == "fp32" else 0.02) and off.max() < (1e-4 if kind == "fp32" else 0.3), off


def one_layer(instructions: str = "", *sizes: int) -> Decoder:
    """A difference of rounding does not grow in it."""
    with patch.dict("os.environ", {"FEDTUNE_NATIVE": instructions}) if instructions else nullcontext():
        return decoder_of(*(sizes or (48, 6, 2, 40, 80)), count=1)


def assert_equal_but_for_rounding(found: Tensor, wanted: Tensor) -> None:
    """In some rows an activation is rounded to another code, which the whole row sees."""
    off = ((found - wanted).abs() / wanted.abs().max()).amax(1)
    assert off.min() < 2e-6 and off.max() < 0.01, off


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache(cache: str) -> None:
    decoder = adapt_all(one_layer())
    ids = torch.randint(37, (90,), generator=torch.Generator().manual_seed(3))

    def pass_logits() -> Tensor:
        make = CACHES[cache](decoder.shape)
        caches, at, parts = [(make(), "wide"), (make(), None), (make(), "narrow")], 0, list[Tensor]()
        for n in (7, 1, 12, 1, 1, 13, 1, *(1,) * 40, 9, 2):
            spans = [Span(cache, n, adapter=name) for cache, name in caches]
            parts.append(run(decoder, torch.from_numpy(decoder.embed(ids[at : at + n].numpy())).repeat(3, 1), spans))
            at += n
        return torch.cat(parts)

    assert_equal_but_for_rounding(*both(decoder, pass_logits))


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("ranks", [(1,), (3,), (4, 2), (17,), (256, 40)])
@pytest.mark.parametrize("sizes", [(300, 5, 1, 64, 530), (33, 1, 1, 4, 7)])
def test_every_rank_and_awkward_sizes(sizes: Sequence[int], ranks: Sequence[int], instructions: str) -> None:
    """More ranks and columns than one thread takes at once, and fewer than a vector has."""
    kernels_of(instructions)
    decoder = one_layer(instructions, *sizes)
    adapt(decoder, mine=factors(decoder, 1, ranks))
    for rows in (4, 19):
        hidden = torch.randn(rows, decoder.shape.hidden, generator=torch.Generator().manual_seed(rows))
        spans = lambda rows=rows: [Span(FullCache(decoder.shape, 20), rows, adapter="mine")]  # noqa: E731
        assert_equal_but_for_rounding(*both(decoder, lambda hidden=hidden, spans=spans: run(decoder, hidden, spans())))


@pytest.mark.parametrize("only", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_each_module_alone(only: str) -> None:
    decoder = one_layer("", 300, 5, 1, 64, 290)
    adapt(decoder, mine=factors(decoder, 1, (6,), only=only))
    hidden = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    found, wanted = both(decoder, lambda: run(decoder, hidden, [Span(FullCache(decoder.shape, 9), 5, adapter="mine")]))
    assert_equal_but_for_rounding(found, wanted)
    assert (found - run(decoder, hidden, [Span(FullCache(decoder.shape, 9), 5)])).abs().max() > 1e-3  # the adapter has an effect


def test_two_pieces_of_the_same_columns_are_both_added() -> None:
    decoder = one_layer("", 40, 2, 1, 16, 50)
    adapt(decoder, mine=factors(decoder, 1, (3,)), other=factors(decoder, 2, (5,)))
    one, other = decoder.adapters["mine"].pieces, decoder.adapters["other"].pieces
    for where, pieces in one.items():
        pieces += other[where]
    hidden = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert_equal_but_for_rounding(*both(decoder, lambda: run(decoder, hidden, [Span(FullCache(decoder.shape, 9), 5, adapter="mine")])))


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("cache", EXACT)
def test_a_row_does_not_depend_on_how_a_text_is_split_on_other_sequences_or_on_threads(cache: str, instructions: str) -> None:
    kernels_of(instructions)
    with patch.dict("os.environ", {"FEDTUNE_NATIVE": instructions}):
        decoder = adapt_all(decoder_of(290, 6, 2, 12, 150, window=45))
    a, b = torch.randint(37, (2, 100), generator=torch.Generator().manual_seed(7))
    make = CACHES[cache](decoder.shape)
    alone, bare = make(), make()
    wanted = torch.cat([forward(decoder, token[None], [Span(alone, 1, adapter="wide")]) for token in a])
    plain = torch.cat([forward(decoder, token[None], [Span(bare, 1)]) for token in b])

    def split(threads: int) -> None:
        make = CACHES[cache](decoder.shape)
        torch.set_num_threads(threads)  # the fixture of all tests sets it back
        assert torch.equal(forward(decoder, a, [Span(make(), 100, keep=None, adapter="wide")]), wanted)
        assert torch.equal(forward(decoder, a[:1], [Span(make(), 1, adapter="wide")]), wanted[:1])
        one, other, third, at = make(), make(), make(), 0
        for n in (31, 1, 8, 17, 43):
            spans = [Span(other, n, keep=None), Span(one, n, keep=None, adapter="wide"), Span(third, n, keep=0, adapter="narrow")]
            parts = [b[at : at + n], a[at : at + n], b[at : at + n]]
            order = (1, 0, 2) if n % 2 else (0, 1, 2)
            logits = forward(decoder, torch.cat([parts[i] for i in order]), [spans[i] for i in order])
            mine, others = (logits[:n], logits[n:]) if n % 2 else (logits[n:], logits[:n])
            assert torch.equal(mine, wanted[at : at + n]) and torch.equal(others, plain[at : at + n])
            at += n

    for threads in (1, 2, 3):
        split(threads)


def test_non_finite_numbers_affect_only_their_sequence() -> None:
    decoder = adapt_all(decoder_of(48, 6, 2, 12, 80))
    hidden = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    wanted = forward(decoder, None, [Span(FullCache(decoder.shape, 9), 3, keep=None, adapter="wide")], embeds=hidden[3:])
    hidden[1, 5] = torch.inf
    spans = [Span(FullCache(decoder.shape, 9), 3, keep=None, adapter="wide") for _ in range(2)]
    logits = forward(decoder, None, spans, embeds=hidden)
    assert not logits[1:3].isfinite().any() and torch.equal(logits[3:], wanted)


def test_an_early_exit_continues_with_its_adapter() -> None:
    decoder = adapt_all(decoder_of(48, 6, 2, 12, 80))
    hidden = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    span = Span(FullCache(decoder.shape, 9), 6, adapter="wide")
    whole = run(decoder, hidden, [Span(FullCache(decoder.shape, 9), 6, adapter="wide")])
    begun = run(decoder, hidden, [span], last=1)
    span.cache.crop(0)
    assert torch.equal(run(decoder, begun, [span], first=1), whole)


@pytest.mark.parametrize("native", [True, False])
def test_an_unknown_adapter_is_refused_before_anything_changes(native: bool) -> None:
    decoder = adapt_all(decoder_of(48, 6, 2, 12, 80))
    caches = [FullCache(decoder.shape, 9) for _ in range(2)]
    with (
        nullcontext() if native else by_torch(decoder),
        pytest.raises(ModelError, match="no adapter named 'odd'; it has: wide, narrow, none"),
    ):
        forward(decoder, torch.arange(4), [Span(caches[0], 2, adapter="wide"), Span(caches[1], 2, adapter="odd")])
    assert all(cache.length == cache.nbytes == 0 for cache in caches)


def test_an_adapter_is_replaced_and_freed() -> None:
    decoder = adapt(decoder_of(48, 6, 2, 12, 80), mine=factors(decoder_of(48, 6, 2, 12, 80), 1, (3,)))

    def logits(name: str | None) -> Tensor:
        return forward(decoder, torch.arange(4), [Span(FullCache(decoder.shape, 4), 4, keep=None, adapter=name)])

    old = logits("mine")
    kept = weakref.ref(decoder.adapters["mine"].pieces[0, "qkv"][0][0])
    assert kept() is not None
    adapt(decoder, mine=factors(decoder, 2, (9,)), other=factors(decoder, 2, (9,)))
    assert not torch.equal(logits("mine"), old) and torch.equal(logits("mine"), logits("other"))
    gc.collect()
    assert kept() is None


def set_piece(name: str, value: int, which: int = -1) -> Callable[[LoraStructure], None]:
    return lambda lora: setattr(lora.pieces[which if which >= 0 else lora.count - 1], name, value)


def set_start(at: int, value: int) -> Callable[[LoraStructure], None]:
    return lambda lora: lora.starts.__setitem__(at, value)


def set_whole(name: str, value: int | None) -> Callable[[LoraStructure], None]:
    return lambda lora: setattr(lora, name, value)


def begin_before_the_first(lora: LoraStructure) -> None:
    """The pieces of the second layer begin before the array, where there is a fitting one."""
    ctypes.c_int64.from_buffer(lora, LoraStructure.pieces.offset).value += ctypes.sizeof(LoraPiece)  # an assignment would free the pieces
    lora.count, lora.starts[1], lora.starts[2] = 13, -1, 13


BAD: Sequence[Callable[[LoraStructure], None]] = [
    set_whole("layers", 1), set_whole("layers", 3), set_whole("count", -1), set_whole("count", 13), set_whole("count", 15),
    set_whole("starts", None), set_whole("pieces", None),
    begin_before_the_first, set_start(0, 1), set_start(0, -1), set_start(1, -1), set_start(1, 15), set_start(2, 13),
    *(set_piece(name, value) for name in ("rank", "n_in", "n") for value in (0, -1, 2**62)),
    *(set_piece(name, value) for name in ("linear", "first") for value in (-1, 4, 2**62)),
    set_piece("rank", 2**24), set_piece("n_in", 81), set_piece("n_in", 79), set_piece("n", 49), set_piece("first", 1),
    set_piece("linear", 1), set_piece("first", 73, 2), set_piece("a", 0), set_piece("b", 0), set_piece("a", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_adapters_that_do_not_fit_are_refused(change: Callable[[LoraStructure], None]) -> None:
    """The last piece is that of down [48, 80] in the second of two layers, piece 2 is v of 24 columns in 96."""
    decoder = adapt(decoder_of(48, 4, 2, 12, 80), mine=factors(decoder_of(48, 4, 2, 12, 80), 1, (3,)))
    structure = decoder.adapters["mine"].structure(decoder.shape)
    assert structure.count == 14 and list(structure.starts[:3]) == [0, 7, 14] and structure.pieces[2].first == 72
    hidden = torch.randn(4, 48)
    span = Span(FullCache(decoder.shape, 9), 4, adapter="mine")
    wanted = run(decoder, hidden, [span])
    span.cache.crop(0)
    change(structure)
    with pytest.raises(ModelError, match="do not fit each other"):
        run(decoder, hidden, [Span(FullCache(decoder.shape, 9), 2), replace(span, n=2)])
    assert span.cache.length == 0 and wanted.isfinite().all()

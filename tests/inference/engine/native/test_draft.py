"""Forks in a pass, and drafts of several tokens in one native call."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import as_float32, to_bfloat16
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.decoder import Decoder
from fedtune.inference.engine.guess import Guesses, Guessing, guess
from fedtune.inference.engine.native.library import SETS, kernels
from tests.inference.engine.native.test_kernels import kernels_of
from tests.inference.engine.native.test_step import CACHES, native_engine, some_ids
from tests.inference.engine.tiny import VOCAB

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs the native kernels")
NAMES = ["llama", "mistral", "gemma2", "olmo2", "llama_dynamic"]  # mistral's and gemma2's layers have windows


def logits_one_by_one(decoder: Decoder, cache: str, text: list[int]) -> np.ndarray:
    """The logits after a text whose tokens are read one by one, (V,)."""
    own = CACHES[cache](decoder.shape)()
    return [decoder.forward([token], [Span(own, 1)]) for token in text][-1][0]


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("cache", ["full", "full bf16", "paged"])
@pytest.mark.parametrize("name", NAMES[:4])
def test_a_fork_sees_the_rows_before_it_and_itself(name: str, cache: str, instructions: str, tmp_path: Path) -> None:
    kernels_of(instructions)
    decoder = native_engine(name, tmp_path, "fp32", instructions).decoder
    for held in (0, 1, 29, 31, 32):  # attention works in tiles of 32 tokens
        text, other = some_ids(VOCAB, 60, held).tolist(), some_ids(VOCAB, 12, held + 1).tolist()
        chain, places = text[held : held + 6], [0, 0, 4, 2, 1, 3, 4]
        first, second = (CACHES[cache](decoder.shape)() for _ in range(2))
        if held:
            decoder.forward(text[:held], [Span(first, held)])
        decoder.forward(other[:3], [Span(second, 3)])
        rows = [*other[3:5], *chain, *other[5 : 5 + len(places)]]
        out = decoder.forward(rows, [Span(second, 2, keep=None), Span(first, len(rows) - 2, keep=None, forks=places)])
        for i in range(6):
            assert np.array_equal(out[2 + i], logits_one_by_one(decoder, cache, text[: held + i + 1]))
        for found, place, token in zip(out[8:], places, other[5:], strict=False):
            assert np.array_equal(found, logits_one_by_one(decoder, cache, [*text[: held + place + 1], token])), (held, place)
        first.crop(held + 6)
        again = decoder.forward([text[held + 6]], [Span(first, 1)])[0]  # the forks' slots are written again
        assert np.array_equal(again, logits_one_by_one(decoder, cache, text[: held + 7]))


def test_forks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path, "fp32").decoder
    for cache, forks in [("full", [2]), ("full", [-1]), ("full", [0, 0, 0]), ("window", [0]), ("4 bits", [0])]:
        with pytest.raises(ModelError, match="parts that do not fit"):
            decoder.forward([1, 2, 3, 4], [Span(CACHES[cache](decoder.shape)(), 4, forks=forks)])


def both(decoder: Decoder, ids: list[int], how: Guessing, held: int = 5, layers: int | None = None, cache: str = "full") -> Guesses:
    """The draft in one call; draft and cache must equal those of single passes."""
    made, caches = [], [CACHES[cache](decoder.shape)() for _ in range(2)]
    for own in caches:
        decoder.forward(some_ids(VOCAB, held, 3), [Span(own, held)], layers=layers)
        with patch.object(FullCache, "in_order", own is caches[0]):
            made.append(guess(decoder, ids, own, how, layers=layers))
        assert own.length == held + len(ids) + len(made[-1].tokens) - 1
    assert np.array_equal(made[0].tokens, made[1].tokens)
    np.testing.assert_allclose(made[0].chances, made[1].chances, rtol=2e-5)
    after = [decoder.forward([7], [Span(own, 1)], layers=layers) for own in caches]
    assert np.array_equal(*after, equal_nan=True)
    return made[0]


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", ["fp32", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_a_draft_in_one_call_is_that_of_single_passes(name: str, kind: str, instructions: str, tmp_path: Path) -> None:
    kernels_of(instructions)
    decoder = native_engine(name, tmp_path, kind, instructions).decoder
    how = Guessing(most=6, vocabulary=VOCAB)
    for ids in ([5], [4, 9, 30]):
        made = both(decoder, ids, how, held=3 if name == "llama_dynamic" else 29)  # the draft's length counts for dynamic scaling
        assert len(made.tokens) == 6
    assert len(both(decoder, [5], how, layers=1).tokens) == 6
    assert len(both(decoder, [5], replace(how, most=1)).tokens) == 1
    both(decoder, [5], how, cache="full bf16")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_settings_of_a_draft_take_effect(name: str, tmp_path: Path) -> None:
    decoder = native_engine(name, tmp_path, "fp32").decoder
    how = Guessing(most=6, vocabulary=VOCAB)
    free = both(decoder, [5], how)
    few = both(decoder, [5], replace(how, vocabulary=37))
    assert few.tokens.max() < 37 <= free.tokens.max()
    assert both(decoder, [5], replace(how, vocabulary=2)).tokens.max() <= 1
    chances = free.chances[:, 0].cumprod()
    for places in (1, 3):
        least = float(np.sqrt(chances[places - 1] * chances[places]))
        assert len(both(decoder, [5], replace(how, least=least)).tokens) == places + 1  # the first token below the threshold is the last
    trusting = replace(how, least=0.9, trust=1e6)
    assert len(both(decoder, [5], trusting).tokens) == 6 > len(both(decoder, [5], replace(how, least=0.9)).tokens)
    sharp = both(decoder, [5], replace(how, sharpness=3.0))
    assert np.array_equal(sharp.tokens, free.tokens) and (sharp.chances[:, 0] > free.chances[:, 0]).all()
    seen = np.zeros(VOCAB, bool)
    seen[free.tokens[0]] = True
    other = both(decoder, [5], replace(how, penalty=50.0, seen=seen))
    assert other.tokens[0, 0] not in free.tokens[0] and len(set(other.tokens[:, 0])) == 6  # drafted tokens are penalized too
    assert seen.sum() == 2


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_without_a_number_end_a_draft(tmp_path: Path) -> None:
    decoder = native_engine("llama", tmp_path, "fp32").decoder
    decoder.embedding = decoder.embedding.copy()
    decoder.embedding[5] = np.nan
    made = both(decoder, [5], Guessing(most=6, vocabulary=VOCAB))
    assert len(made.tokens) == 1 and np.isnan(made.chances[0, 0])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_drafts_read_every_kind_of_embedding_table(name: str, tmp_path: Path) -> None:
    decoder = native_engine(name, tmp_path, "fp32").decoder
    whole = decoder.embedding
    tables = [to_bfloat16(whole), whole.astype(np.float16)]
    for table in tables:
        decoder.embedding = table
        assert np.abs(as_float32(table) - whole).max() < 0.01 * np.abs(whole).max()
        both(decoder, [5], Guessing(most=6, vocabulary=VOCAB))

"""Perplexity by hand; every token is scored once, after its preceding tokens."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtune.errors import DataError
from fedtune.inference.engine.load import load_engine
from fedtune.inference.quantize.perplexity import answers, engine_score, of_engine, perplexity, score, windows
from tests.inference.engine.tiny import VOCAB, tiny_model


@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 19))
def test_each_token_but_the_first_is_scored_once(length: int, window: int, stride: int) -> None:
    if stride >= window:
        return
    ids, scored = torch.arange(length), []
    for piece, new in windows(ids, window, stride):
        assert new < len(piece) <= window  # at least one token precedes the first scored one
        assert new <= stride or int(piece[0]) == 0
        scored += piece[-new:].tolist()
    assert scored == list(range(1, length))


def test_windows_overlap_by_half() -> None:
    def pieces(window: int) -> list[tuple[list[int], int]]:
        return [(piece.tolist(), new) for piece, new in windows(torch.arange(6), window)]

    assert pieces(4) == [([0, 1, 2, 3], 3), ([2, 3, 4, 5], 2)]
    assert pieces(3) == [([0, 1, 2], 2), ([1, 2, 3], 1), ([2, 3, 4], 1), ([3, 4, 5], 1)]
    assert pieces(2) == [([i, i + 1], 1) for i in range(5)]


def test_perplexity_by_hand() -> None:
    # a model that gives 3/4 to the token after the last one and 1/4 to the others, of 4 tokens: the text counts up twice, then fails once
    def model(ids: Tensor) -> Tensor:
        out = torch.full((len(ids), 4), math.log(1 / 12))
        out[torch.arange(len(ids)), (ids + 1) % 4] = math.log(3 / 4)
        return out

    score = perplexity(model, torch.tensor([0, 1, 2, 0]), window=4)
    assert score.tokens == 3
    assert score.nats == pytest.approx(-(2 * math.log(3 / 4) + math.log(1 / 12)) / 3)
    assert score.perplexity == pytest.approx((16 / 9 * 12) ** (1 / 3))
    # it reads only the previous token, so windows of two are enough
    assert perplexity(model, torch.tensor([0, 1, 2, 0]), window=2, stride=1).nats == pytest.approx(score.nats)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    assert perplexity(lambda ids: torch.zeros(len(ids), 7), torch.arange(50) % 7, window=9).perplexity == pytest.approx(7)


def test_the_engines_score_is_that_of_its_logits(tmp_path: Path) -> None:
    tiny_model("qwen3", tmp_path)
    engine = load_engine(tmp_path, "fp32")
    ids = torch.randint(0, VOCAB, (31,), generator=torch.Generator().manual_seed(0))
    logits = of_engine(engine)(ids)
    assert logits.shape == (31, VOCAB)
    whole = -logits[:-1].log_softmax(1).gather(1, ids[1:, None]).mean()
    assert perplexity(of_engine(engine), ids, window=64).nats == pytest.approx(float(whole), rel=1e-5)
    # shorter windows have less context, so the perplexity differs
    assert perplexity(of_engine(engine), ids, window=8).nats != pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize(("tokens", "window", "stride"), [(1, 8, None), (9, 1, None), (9, 4, 4), (9, 4, -1)])
def test_unscorable_texts_are_refused(tokens: int, window: int, stride: int | None) -> None:
    with pytest.raises(DataError, match="overlapping windows"):
        perplexity(lambda ids: torch.zeros(len(ids), 3), torch.zeros(tokens, dtype=torch.long), window=window, stride=stride)


def test_only_answers_are_scored() -> None:
    rows = [([1, 2], [3]), ([1] * 9, [2]), ([], [1]), ([1], []), ([2], [0, 1]), ([1], [2])]
    pieces = answers(rows, 3, window=9)
    assert [(ids.tolist(), new) for ids, new in pieces] == [([1, 2, 3], 1), ([2, 0, 1], 2)]  # the second is too long, the last one too many

    def model(ids: torch.Tensor) -> torch.Tensor:  # of four tokens, gives the one that comes after its own number half of the probability
        return torch.log(torch.full((len(ids), 4), 1 / 6) + torch.nn.functional.one_hot((ids + 1) % 4, 4) / 3)

    # after 2 comes 3: 1/2; after 2 a 0: 1/6; after 0 a 1: 1/2
    result = score(model, pieces)
    assert result.tokens == 3 and result.perplexity == pytest.approx((2 * 6 * 2) ** (1 / 3))


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_an_engine_is_scored_in_parts(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.inference.quantize.perplexity._ROWS", 5)
    monkeypatch.setattr("fedtune.inference.quantize.perplexity._STRETCH", 2 * VOCAB)
    tiny_model("qwen3", tmp_path)
    engine = load_engine(tmp_path, kind)
    pieces = list(windows(torch.randint(0, VOCAB, (43,), generator=torch.Generator().manual_seed(4)), 12))
    result, whole = engine_score(engine, pieces), score(of_engine(engine), pieces)
    assert result.tokens == whole.tokens == 42 and abs(result.nats - whole.nats) < 1e-4

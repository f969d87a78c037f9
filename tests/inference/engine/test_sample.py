import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.sample import Sampler, Sampling, Uniforms, draw, probabilities, rate, scores


def floats(values: Any) -> np.ndarray:
    return np.array(values, np.float32)


def theirs(ids: torch.Tensor, logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """transformers' processors, in the order of `generate`."""
    chain = [RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))] if s.repetition_penalty != 1 else []
    chain += [TemperatureLogitsWarper(float(s.temperature))] if s.temperature != 1 else []
    chain += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    chain += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    chain += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    return torch.as_tensor(LogitsProcessorList(chain)(ids, logits.clone()))  # type: ignore[arg-type]


def check(ours: np.ndarray, wanted: np.ndarray, *, ties: bool) -> None:
    """Assert equality. With ties, torch's sort decides which of the least likely tokens are kept, but not how many."""
    if not ties:
        return np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(np.sort(ours), np.sort(wanted))
    for one, other in zip(ours, wanted, strict=True):
        least = min(one[one > -np.inf])
        assert set(np.maximum(one, other)[one != other]) <= {least}
        kept, excluded = np.flatnonzero(one == least), np.flatnonzero((one != other) & (one == -np.inf))
        assert not len(excluded) or max(kept) < min(excluded)  # in a tie the first tokens are kept


@given(
    seed=st.integers(0, 10**6), temperature=st.sampled_from([0.3, 1.0, 1.7]), top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]), min_p=st.sampled_from([0.0, 0.05, 0.6, 1.0]), penalty=st.sampled_from([1.0, 1.3, 0.8]),
    ties=st.booleans(),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_every_processor_equals_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, ties: bool
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(3, 37) * 4
    logits = logits.round() if ties else logits
    ids = torch.randint(0, 37, (3, 9))
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    seen, before = torch.zeros(3, 37, dtype=torch.bool).scatter(1, ids, True), logits.clone()
    check(scores(logits.numpy(), s, seen.numpy()), theirs(ids, logits, s).numpy(), ties=ties)
    assert torch.equal(logits, before)


def test_top_p_by_hand() -> None:
    # p = .5, .3, .2: the first two reach .7, the third is not needed; they are drawn 5 : 3
    p = probabilities(np.log(floats([[0.5, 0.3, 0.2]])), Sampling(temperature=1.0, top_p=0.7))
    np.testing.assert_allclose(p, [[0.625, 0.375, 0.0]], rtol=1e-6)
    # ten equal tokens: nine reach .9 in float32, the first of the tie; one reaches .05, as greedy decoding chooses it
    assert [np.flatnonzero(scores(floats([[2.0] * 10]), Sampling(temperature=1.0, top_p=x)) == 2).tolist() for x in (0.9, 0.05)] == [
        [*range(9)],
        [0],
    ]


def test_greedy_puts_all_probability_on_the_first_maximum() -> None:
    assert probabilities(floats([[1.0, 3.0, 3.0]]), Sampling()).tolist() == [[0.0, 1.0, 0.0]]
    # 3 / 2 < 2: the penalty moves even a greedy choice; and -1 · 2 for the negative one
    seen = np.array([False, True, False])
    assert scores(floats([[2.0, 3.0, 0.5]]), Sampling(repetition_penalty=2.0), seen).tolist() == [[2.0, 1.5, 0.5]]
    assert Sampler(Sampling(repetition_penalty=2.0), [1], 3).next(floats([2.0, 3.0, 0.5])) == 0


def test_draw_by_hand() -> None:
    p = floats([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(4, 0)
    u = np.array([0.0, 0.2499, 0.25, 1 - 2**-53])
    assert draw(p, u).tolist() == [1, 1, 3, 3]  # never a token of weight zero, at either end
    assert draw(3 * p, u).tolist() == [1, 1, 3, 3]  # weights need not sum to 1


@given(st.integers(0, 10**6), st.integers(1, 5000), st.sampled_from([0.0, 0.5, 0.99]))
@settings(max_examples=50, deadline=None)
def test_draw_finds_the_quantile_in_rows_of_any_width(seed: int, width: int, zeros: float) -> None:
    rng = np.random.default_rng(seed)
    row = (np.exp(-30 * rng.random(width)) * (rng.random(width) >= zeros)).astype(np.float32)
    row[rng.integers(width)] = 1
    total = math.fsum(row)
    ends = np.array([math.fsum(row[:end]) / total for end in range(256, width, 256)])  # at the ends of partial sums, where rounding matters
    u = np.minimum([0.0, rng.random(), 1, *ends, *np.nextafter(ends, 0), *np.nextafter(ends, 1)], 1 - 2**-53)
    for quantile, token in zip(u, draw(np.tile(row, (len(u), 1)), u), strict=True):
        assert row[token] > 0
        assert math.fsum(row[:token]) <= quantile * total * (1 + 1e-12) and quantile * total <= math.fsum(row[: token + 1]) * (1 + 1e-12)


def test_draw_needs_finite_weights() -> None:
    for bad in (math.nan, math.inf):
        p = np.ones((2, 600), np.float32)
        p[1, 500] = bad
        with pytest.raises(ModelError, match="not finite"):
            draw(p, np.array([0.1, 0.1]))
    with pytest.raises(ModelError, match="not finite"):
        draw(np.zeros((1, 3), np.float32), np.array([0.1]))


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.5}, {"temperature": 1.0}, {"temperature": 1e-9}, {"temperature": 1.0, "top_k": 2},
     {"temperature": 1.0, "top_p": 0.5}, {"temperature": 1.0, "min_p": 0.1}],
)  # fmt: skip
def test_logits_that_are_not_finite_are_refused_wherever_they_are(options: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(**options), [1], 600)
    assert 0 <= sampler.next(np.zeros(600, np.float32)) < 600
    for bad, places in itertools.product((math.nan, math.inf), ([0], [1], [599], range(600))):
        logits = np.zeros(600, np.float32)
        logits[list(places)] = bad
        with pytest.raises(ModelError, match="the model's logits are not finite"):
            sampler.next(logits)
    with pytest.raises(ModelError, match="the model's logits are not finite"):
        sampler.next(np.full(600, -np.inf, np.float32))
    excluded = np.full(600, -np.inf, np.float32)  # as a decoder may exclude tokens
    excluded[[3, 4]] = 2, -1e38
    assert sampler.next(excluded) == 3


@pytest.mark.parametrize("width", [7, 5000])
def test_top_p_of_many_tokens_equals_that_of_transformers(width: int) -> None:
    torch.manual_seed(width)
    logits = torch.cat([(torch.randn(4, width) * 3).round(decimals=1), torch.zeros(1, width)])  # with ties
    for top_p in (0.05, 0.5, 0.9, 0.999):
        s = Sampling(temperature=1.0, top_p=top_p)
        ids = torch.zeros(5, 1, dtype=torch.long)
        check(scores(logits.numpy(), s), theirs(ids, logits, s).numpy(), ties=True)
    only = scores(logits.numpy(), Sampling(temperature=1.0, top_p=1e-9))  # the most likely token always stays
    assert [np.flatnonzero(row > -np.inf).tolist() for row in only] == logits.numpy().argmax(-1, keepdims=True).tolist()


def test_top_p_of_equal_tokens_rounds_like_that_of_transformers() -> None:
    for width, top_p in itertools.product(range(2, 60), (0.9, 0.7, 0.5, 0.2)):
        logits, s = torch.zeros(1, width), Sampling(temperature=1.0, top_p=top_p)
        check(scores(logits.numpy(), s), theirs(torch.zeros(1, 1, dtype=torch.long), logits, s).numpy(), ties=True)


def test_each_row_has_its_own_distribution() -> None:
    p = probabilities(floats([[0, 1], [1000, 1001]]), Sampling(temperature=1.0))
    np.testing.assert_allclose(p, [[1 / (1 + math.e), math.e / (1 + math.e)]] * 2, rtol=1e-6)


def test_a_rate_is_the_log_probability_of_the_unmodified_model() -> None:
    logits = floats([1.0, 3.0, -np.inf, 3.0, 2.0])
    logs = torch.from_numpy(logits).log_softmax(-1).tolist()
    logprob, rivals = rate(logits, 4, 3)
    assert logprob == pytest.approx(logs[4], abs=1e-6) and type(logprob) is float
    assert [token for token, _ in rivals] == [1, 3, 4]  # the first of a tie first
    assert [value for _, value in rivals] == pytest.approx([logs[token] for token, _ in rivals], abs=1e-6)
    assert rate(logits, 2, 0) == (-math.inf, ())
    assert [token for token, _ in rate(logits, 0, 9)[1]] == [1, 3, 4, 0, 2]
    assert [token for token, _ in rate(floats([i % 7 for i in range(500)]), 0, 400)[1]] == sorted(range(500), key=lambda i: -(i % 7))[:400]
    assert rate(logits, 0, 1)[1] == ((1, pytest.approx(logs[1], abs=1e-6)),)
    assert rate(logits + 1e4, 0, 0)[0] == pytest.approx(logs[0], abs=1e-2)  # no overflow


def test_draws_follow_the_distribution() -> None:
    p = floats([0.1, 0.0, 0.6, 0.3])
    n = 100_000
    counts = np.bincount(draw(np.broadcast_to(p, (n, 4)), Uniforms(5, "generate")(0, n)), minlength=4)
    assert counts[1] == 0
    keep = [0, 2, 3]
    chi = float((((counts - n * p) ** 2)[keep] / (n * p)[keep]).sum())
    assert chi < 13.82  # 2 degrees of freedom, p = .001


def test_uniforms_depend_on_the_position_and_not_on_the_calls() -> None:
    whole = Uniforms(3, "generate")(0, 200)
    other = Uniforms(3, "generate")
    assert [*other(150, 10), *other(0, 3), *other(3, 60)] == [*whole[150:160], *whole[:63]]
    assert len({*whole, *Uniforms(3, "draft")(0, 8), *Uniforms(4, "generate")(0, 8)}) == 216
    assert whole.dtype == np.float64 and whole.min() >= 0 and whole.max() < 1


def test_the_seed_determines_draws_and_the_global_generators_are_unchanged() -> None:
    logits = np.zeros(50, np.float32)

    def text(seed: int) -> list[int]:
        sampler, out = Sampler(Sampling(temperature=1.0, seed=seed), [], 50), []
        for _ in range(20):
            out.append(sampler.next(logits))
            sampler.take(out[-1])
        return out

    state, ours = torch.get_rng_state(), np.random.get_state(legacy=False)
    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state) and str(np.random.get_state(legacy=False)) == str(ours) and len(set(text(1))) > 5


@pytest.mark.parametrize(
    ("options", "words"),
    [({"temperature": -1.0}, "temperature=-1.0"), ({"temperature": float("nan")}, "temperature=nan"),
     ({"temperature": float("inf")}, "temperature=inf"), ({"top_k": -1}, "top_k=-1"), ({"top_p": 0.0}, "top_p=0.0"),
     ({"top_p": 1.1}, "top_p=1.1"), ({"min_p": 1.5}, "min_p=1.5"), ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
     ({"stop": ("",)}, "stop string is empty")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampling(**options)


def test_the_smallest_temperature_is_greedy() -> None:
    logits = floats([[3.0, -2.0, 5.0, 4.999]])
    assert probabilities(logits, Sampling(temperature=5e-324)).tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert probabilities(logits, Sampling(temperature=9e-4))[0, 2] == pytest.approx(1 / (1 + math.exp(-0.001 / 9e-4)), rel=1e-3)

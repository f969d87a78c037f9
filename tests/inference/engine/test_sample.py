import math
from typing import Any

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

from fedtune.errors import ConfigError
from fedtune.inference.engine.sample import Sampler, Sampling, Uniforms, draw, probabilities, scores


def theirs(ids: torch.Tensor, logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """transformers' processors, in the order of `generate`."""
    chain = [RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))] if s.repetition_penalty != 1 else []
    chain += [TemperatureLogitsWarper(float(s.temperature))] if s.temperature != 1 else []
    chain += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    chain += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    chain += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    return torch.as_tensor(LogitsProcessorList(chain)(ids, logits.clone()))  # type: ignore[arg-type]


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
    seen = torch.zeros(3, 37, dtype=torch.bool).scatter(1, ids, True)
    torch.testing.assert_close(scores(logits, s, seen), theirs(ids, logits, s), rtol=0, atol=0)


def test_top_p_by_hand() -> None:
    # p = .5, .3, .2: the first two reach .7, the third is not needed; they are drawn 5 : 3
    p = probabilities(torch.tensor([[0.5, 0.3, 0.2]]).log(), Sampling(temperature=1.0, top_p=0.7))
    torch.testing.assert_close(p, torch.tensor([[0.625, 0.375, 0.0]]))


def test_greedy_puts_all_probability_on_the_first_maximum() -> None:
    assert probabilities(torch.tensor([[1.0, 3.0, 3.0]]), Sampling()).tolist() == [[0.0, 1.0, 0.0]]
    # 3 / 2 < 2: the penalty moves even a greedy choice; and -1 · 2 for the negative one
    seen = torch.tensor([False, True, False])
    assert scores(torch.tensor([[2.0, 3.0, 0.5]]), Sampling(repetition_penalty=2.0), seen).tolist() == [[2.0, 1.5, 0.5]]
    assert Sampler(Sampling(repetition_penalty=2.0), [1], 3).next(torch.tensor([2.0, 3.0, 0.5])) == 0


def test_draw_by_hand() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(4, 1)
    u = torch.tensor([0.0, 0.2499, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert draw(p, u).tolist() == [1, 1, 3, 3]  # never a token of weight zero, at either end
    assert draw(3 * p, u).tolist() == [1, 1, 3, 3]  # weights need not sum to 1


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    n = 100_000
    counts = draw(p.expand(n, 4), Uniforms(5, "generate")(0, n)).bincount(minlength=4)
    assert counts[1] == 0
    keep = [0, 2, 3]
    chi = float((((counts - n * p) ** 2)[keep] / (n * p)[keep]).sum())
    assert chi < 13.82  # 2 degrees of freedom, p = .001


def test_uniforms_depend_on_the_position_and_not_on_the_calls() -> None:
    whole = Uniforms(3, "generate")(0, 200)
    other = Uniforms(3, "generate")
    assert torch.equal(torch.cat([other(150, 10), other(0, 3), other(3, 60)]), torch.cat([whole[150:160], whole[:63]]))
    assert not torch.equal(Uniforms(3, "draft")(0, 8), whole[:8]) and not torch.equal(Uniforms(4, "generate")(0, 8), whole[:8])
    assert len(whole.unique()) == 200


def test_a_row_after_draft_tokens_counts_them_as_seen() -> None:
    sampler = Sampler(Sampling(repetition_penalty=1.5), [0, 3], 6)
    sampler.take(5)
    rows = sampler.seen([1, 2, 1])
    assert rows is not None
    assert [row.nonzero().flatten().tolist() for row in rows] == [[0, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5]]
    again = sampler.seen()
    assert again is not None and again[0].nonzero().flatten().tolist() == [0, 3, 5]  # guesses are not remembered
    assert Sampler(Sampling(), [0], 6).seen([1]) is None


def test_the_seed_determines_draws_and_the_global_generator_is_unchanged() -> None:
    logits = torch.zeros(50)

    def text(seed: int) -> list[int]:
        sampler, out = Sampler(Sampling(temperature=1.0, seed=seed), [], 50), []
        for _ in range(20):
            out.append(sampler.next(logits))
            sampler.take(out[-1])
        return out

    state = torch.get_rng_state()
    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), state) and len(set(text(1))) > 5


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
    logits = torch.tensor([[3.0, -2.0, 5.0, 4.999]])
    assert probabilities(logits, Sampling(temperature=5e-324)).tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert probabilities(logits, Sampling(temperature=9e-4))[0, 2] == pytest.approx(1 / (1 + math.exp(-0.001 / 9e-4)), rel=1e-3)

"""FedEx-LoRA: averaged factors and a residual make the mean of the clients' weights."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import METHODS, Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Update
from fedtune.errors import ConfigError
from fedtune.strategies import _lowrank, fedex
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedex import FedEx
from tests.strategies.lowrank import (
    SHAPES,
    adapter,
    assert_equal,
    assert_exact_on_conv1d,
    change,
    cohort,
    delta,
    in_bf16,
    mean,
    swap_if_square,
)


def test_the_residual_by_hand() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 2.0})

    def rank_one(n: int, a: float, b: float) -> Update:
        state = AdapterState({"q.lora_A": torch.tensor([[float(a)]]), "q.lora_B": torch.tensor([[float(b)]])}, spec)
        return Update(client=str(n), round=1, base_version=0, adapter=state, examples=n)

    updates = [rank_one(1, a=1, b=1), rank_one(3, a=5, b=5)]
    after = FedEx().aggregate(1, FedEx().start(updates[0].adapter), iter(updates))
    # by hand: Ā = B̄ = 4, so s·B̄Ā = 2·16 = 32; the mean of s·B·A is 2·19 = 38; the residual is 6
    (shift,) = after.shifts
    assert after.adapter["q.lora_A"].item() == after.adapter["q.lora_B"].item() == 4.0
    assert (shift["q.lora_B"] @ shift["q.lora_A"]).item() == pytest.approx(6.0, rel=1e-6) and shift.spec.scaling == {"q": 1.0}


@settings(deadline=None, max_examples=25)
@given(counts=st.lists(st.integers(1, 1000), min_size=1, max_size=6), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_unequal_counts_are_exact(counts: list[int], rank: int, seed: int) -> None:
    updates = cohort([rank] * len(counts), counts, seed=seed)
    start = FedEx().start(adapter(rank=rank))
    after = FedEx().aggregate(1, start, iter(updates))
    assert_equal(change(after), mean(updates))
    averaged = FedAvg().aggregate(1, start, iter(updates)).adapter
    assert all(torch.equal(after.adapter[n], averaged[n]) for n in averaged.tensors)


def test_the_result_is_exact_on_gpt2_layers() -> None:
    assert_exact_on_conv1d(FedEx())


def test_unequal_scalings_are_exact() -> None:
    updates = [
        Update(client=f"c{n}", round=1, base_version=0, adapter=u.adapter.replace(scaling=dict.fromkeys(SHAPES, 0.3 * n)), examples=n)
        for n, u in enumerate(cohort(), start=1)
    ]
    assert_equal(change(FedEx().aggregate(1, FedEx().start(adapter()), iter(updates))), mean(updates))


def test_the_residual_is_sent_at_its_true_rank() -> None:
    after = FedEx().aggregate(1, FedEx().start(adapter()), iter(cohort()))
    # three clients of rank 2: rank (3 − 1)·2 = 4, or the smaller side of the layer; the bare stack would be 8
    assert dict(after.shifts[0].spec.ranks) == {"q": 3, "up": 4, "square": 4}


def test_a_bf16_adapter_is_exact_too() -> None:
    (start,) = in_bf16(cohort([2], [1]))
    updates = in_bf16(cohort())
    after = FedEx().aggregate(1, FedEx().start(start.adapter), iter(updates))
    assert_equal(change(after), mean(updates))  # the residual also corrects the rounding of Ā and B̄
    assert {t.dtype for t in after.adapter.tensors.values()} == {torch.bfloat16}


def test_one_client_keeps_its_own_factors_and_nothing_is_shifted() -> None:
    (alone,) = cohort([3], [7919])
    after = FedEx().aggregate(1, FedEx().start(adapter(rank=3)), iter([alone]))
    assert after.shifts == () and all(torch.equal(after.adapter[n], alone.adapter[n]) for n in alone.adapter.tensors)


def test_the_order_of_clients_changes_nothing() -> None:
    for some in itertools.permutations(cohort()):
        assert_equal(change(FedEx().aggregate(1, FedEx().start(adapter()), iter(some))), mean(cohort()))


def test_rounds_add_up() -> None:
    state = FedEx().start(adapter())
    for round in (1, 2, 3):
        before = {m: x - delta(state.adapter)[m] for m, x in change(state).items()}
        updates = cohort(seed=10 * round)
        state = FedEx().aggregate(round, state, iter(updates))
        assert_equal(change(state), {m: before[m] + x for m, x in mean(updates).items()})
    assert [s.spec.version for s in state.shifts] == [1, 2, 3]


@pytest.mark.parametrize("method", METHODS)
def test_only_plain_lora_is_accepted(method: str) -> None:
    config = Config(peft=PeftConfig(method=method))
    if method in ("lora", "rslora"):
        FedEx().check(config)
    else:
        with pytest.raises(ConfigError, match=rf"strategy=fedex does not work with peft.method={method}: "):
            FedEx().check(config)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda terms: swap_if_square(_lowrank.compact(terms)), id="residual transposed"),
        pytest.param(lambda terms: _lowrank.compact([(terms[-1][0] / -3, a, b) for _, a, b in terms[:-1]] + terms[-1:]), id="p_k dropped"),
        pytest.param(lambda terms: _lowrank.compact([*terms[:-1], (-1.0, *terms[-1][1:])]), id="s dropped"),
    ],
)
def test_a_wrong_residual_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedex, "compact", wrong)
    after = FedEx().aggregate(1, FedEx().start(adapter()), iter(cohort()))
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(change(after), mean(cohort()))

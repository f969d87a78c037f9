"""FlexLoRA: the best approximation of the mean update at each client's rank."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import METHODS, Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.errors import ConfigError
from fedtune.strategies import _lowrank, flexlora
from fedtune.strategies.flexlora import FlexLoRA
from tests.strategies.lowrank import SHAPES, adapter, assert_equal, change, cohort, delta, mean, swap_if_square, zero_adapter


def changes(before: AdapterState, updates: Sequence[Update]) -> dict[str, torch.Tensor]:
    """Module → D + Σ p_k (s_k B_k A_k − P_{r_k}(D)), dense and slow: the exact result before truncation."""
    total, own = sum(u.examples for u in updates), delta(before)
    out = {m: own[m].clone() for m in SHAPES}
    for u in updates:
        for m in SHAPES:
            r, s = u.adapter.spec.ranks[m], before.spec.scaling[m]
            sent = s * before[f"{m}.lora_B"][:, :r].double() @ before[f"{m}.lora_A"][:r].double()
            out[m] += u.examples / total * (delta(u.adapter)[m] - sent)
    return out


def tail(matrix: torch.Tensor, rank: int) -> float:
    return math.sqrt(float((torch.linalg.svdvals(matrix)[rank:] ** 2).sum()))


@settings(deadline=None, max_examples=25)
@given(
    clients=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 1000)), min_size=1, max_size=6),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_each_client_is_off_by_the_tail_of_the_sum_of_changes(clients: list[tuple[int, int]], rank: int, seed: int) -> None:
    updates = cohort([r for r, _ in clients], [n for _, n in clients], seed=seed)
    before = adapter(rank=4)
    after = FlexLoRA().aggregate(1, FlexLoRA().start(before), iter(updates))
    (assignment,) = FlexLoRA().plan(2, [Plan(round=2, client="c", base_version=1, rank=rank)], after).values()
    actual, expected = delta(assignment.adapter), changes(before, updates)
    for module, matrix in expected.items():
        assert assignment.adapter.spec.scaling[module] == pytest.approx(3.0 / rank)  # alpha / r_k
        error = float((actual[module] - matrix).norm())
        assert abs(error - tail(matrix, rank)) <= 1e-6 * float(matrix.norm())


def test_the_result_is_exact_if_the_rank_suffices() -> None:
    updates = cohort([1, 2, 1])
    after = FlexLoRA().aggregate(1, FlexLoRA().start(zero_adapter(4)), iter(updates))
    assert_equal(change(after), mean(updates))
    for module in ("up", "square"):  # A has orthonormal rows, and B columns of falling norm
        a, b = after.adapter[f"{module}.lora_A"], after.adapter[f"{module}.lora_B"]
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-6) and torch.equal(b.norm(dim=0), b.norm(dim=0).sort(descending=True).values)


def test_equal_ranks_are_summed_as_in_the_paper() -> None:
    updates = cohort([4, 4, 4])
    for seed in (0, 9):  # Σ p_k s_k B_k A_k for any initial adapter of the round
        actual = change(FlexLoRA().aggregate(1, FlexLoRA().start(adapter(seed, rank=4)), iter(updates)))
        for module, matrix in mean(updates).items():
            assert abs(float((actual[module] - matrix).norm()) - tail(matrix, 4)) <= 1e-6 * float(matrix.norm())


def test_one_client_keeps_its_own_update() -> None:
    (alone,) = cohort([3], [5])
    assert_equal(change(FlexLoRA().aggregate(1, FlexLoRA().start(adapter(rank=3)), iter([alone]))), delta(alone.adapter))


def test_the_order_of_clients_changes_nothing() -> None:
    start = FlexLoRA().start(adapter(rank=4))
    results = [FlexLoRA().aggregate(1, start, iter(some)).adapter for some in itertools.permutations(cohort())]
    for other in results[1:]:  # even the factors, since the signs are fixed
        assert all(torch.allclose(other[n], results[0][n], atol=1e-5) for n in other.tensors)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_a_round_of_small_devices_leaves_every_direction_trainable(method: str) -> None:
    start = FlexLoRA().start(zero_adapter(4, method))
    after = FlexLoRA().aggregate(1, start, iter(cohort([1], [3]))).adapter
    for module in ("up", "square"):
        a, b = after[f"{module}.lora_A"], after[f"{module}.lora_B"]
        # D has rank 1: B's other columns are zero, so A's rows, which determine their gradient, must not be
        assert b[:, 1:].abs().max() < 1e-5 and torch.allclose(a @ a.T, torch.eye(4), atol=1e-6)


def test_a_cohort_without_change_is_accepted() -> None:
    updates = cohort()
    zero_adapter = [u.adapter.replace({n: t * (not n.endswith("_B")) for n, t in u.adapter.tensors.items()}) for u in updates]
    same = [dataclasses.replace(u, adapter=a) for u, a in zip(updates, zero_adapter, strict=True)]
    after = FlexLoRA().aggregate(1, FlexLoRA().start(adapter()), iter(same)).adapter
    assert all(torch.isfinite(t).all() for t in after.tensors.values()) and not any(after[f"{m}.lora_B"].any() for m in SHAPES)


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_with_factors_are_accepted(method: str) -> None:
    config = Config(peft=PeftConfig(method=method))
    if method in ("lora", "rslora", "dora"):
        FlexLoRA().check(config)
    else:
        with pytest.raises(
            ConfigError, match=rf"strategy=flexlora does not work with peft.method={method}: .* take peft=dora or peft=lora or peft=rslora,"
        ):
            FlexLoRA().check(config)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda terms: swap_if_square(_lowrank.stack(terms)), id="A and B swapped"),
        pytest.param(lambda terms: _lowrank.stack([(1 / len(terms), a, b) for _, a, b in terms]), id="weights dropped"),
    ],
)
def test_a_wrong_sum_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flexlora, "stack", wrong)
    after = FlexLoRA().aggregate(1, FlexLoRA().start(zero_adapter(4)), iter(cohort([1, 2, 1])))
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(change(after), mean(cohort([1, 2, 1])))

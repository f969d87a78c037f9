"""LoRA-FAIR: B is corrected for the error of averaging, within the row space of Ā."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import METHODS, Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import lora_fair
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.lora_fair import LoRAFair
from tests.strategies.lowrank import adapter, assert_equal, change, cohort, delta, mean, swap_if_square


def dense(average: AdapterState, updates: list[Update], ridge: float) -> dict[str, Tensor]:
    """Module → s·(B̄ + ΔB)·Ā with the dense E: the formula itself, slow."""
    out = {}
    for module, d in mean(updates).items():
        s, a, b = average.spec.scaling[module], average[f"{module}.lora_A"].double(), average[f"{module}.lora_B"].double()
        e = d / s - b @ a
        out[module] = s * (b + e @ a.T @ torch.linalg.inv(a @ a.T + ridge * torch.eye(len(a)))) @ a
    return out


def average(start: ServerState, updates: list[Update]) -> AdapterState:
    return FedAvg().aggregate(1, start, iter(updates)).adapter


def test_the_correction_by_hand() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 2.0})

    def rank_one(client: str, a: float, b: float) -> Update:
        state = AdapterState({"q.lora_A": torch.tensor([[float(a)]]), "q.lora_B": torch.tensor([[float(b)]])}, spec)
        return Update(client=client, round=1, base_version=0, adapter=state, examples=5)

    updates = [rank_one("a", a=1, b=1), rank_one("b", a=3, b=2)]
    after = LoRAFair(ridge=1.0).aggregate(1, LoRAFair().start(updates[0].adapter), iter(updates)).adapter
    # by hand: Ā = 2, B̄ = 1.5, E = (1·1 + 2·3) / 2 − 3 = 0.5, ΔB = 0.5 · 2 / (4 + 1) = 0.2
    assert after["q.lora_A"].item() == 2.0 and after["q.lora_B"].item() == pytest.approx(1.7, rel=1e-7)


@settings(deadline=None, max_examples=25)
@given(counts=st.lists(st.integers(1, 1000), min_size=1, max_size=6), ridge=st.floats(1e-3, 10), seed=st.integers(0, 99))
def test_the_factored_form_is_the_dense_one_and_never_worse_than_averaging(counts: list[int], ridge: float, seed: int) -> None:
    updates, start = cohort([2] * len(counts), counts, seed=seed), LoRAFair().start(adapter())
    after, plain, expected = LoRAFair(ridge=ridge).aggregate(1, start, iter(updates)), average(start, updates), mean(updates)
    assert_equal(change(after), dense(plain, updates, ridge), tolerance=5e-6)
    for module, matrix in expected.items():
        assert (change(after)[module] - matrix).norm() <= (delta(plain)[module] - matrix).norm() + 1e-5
        assert torch.equal(after.adapter[f"{module}.lora_A"], plain[f"{module}.lora_A"])
    assert torch.equal(after.adapter["score.weight"], plain["score.weight"])


def test_a_small_ridge_projects_and_a_large_one_averages() -> None:
    start, updates = LoRAFair().start(adapter()), cohort()
    plain = average(start, updates)
    projected = {}
    for module, matrix in mean(updates).items():
        a = plain[f"{module}.lora_A"].double()
        projected[module] = matrix @ torch.linalg.pinv(a) @ a  # onto Ā's row space
    assert_equal(change(LoRAFair(ridge=1e-9).aggregate(1, start, iter(updates))), projected, tolerance=5e-6)
    assert_equal(change(LoRAFair(ridge=1e9).aggregate(1, start, iter(updates))), delta(plain))


def test_the_result_is_exact_if_all_clients_share_one_a() -> None:
    first, updates = adapter(), cohort()
    same = [
        Update(
            client=u.client,
            round=1,
            base_version=0,
            adapter=u.adapter.replace({n: first[n] if n.endswith("_A") else t for n, t in u.adapter.tensors.items()}),
            examples=u.examples,
        )
        for u in updates
    ]
    assert_equal(change(LoRAFair().aggregate(1, LoRAFair().start(first), iter(same))), mean(same))


def test_one_client_keeps_its_own_update() -> None:
    (alone,) = cohort([3], [5])
    assert_equal(change(LoRAFair().aggregate(1, LoRAFair().start(adapter(rank=3)), iter([alone]))), delta(alone.adapter))


def test_the_order_of_clients_changes_nothing() -> None:
    start = LoRAFair().start(adapter())
    results = [change(LoRAFair().aggregate(1, start, iter(some))) for some in itertools.permutations(cohort())]
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_with_factors_are_accepted(method: str) -> None:
    config = Config(peft=PeftConfig(method=method))
    if method in ("lora", "rslora", "dora"):
        LoRAFair().check(config)
    else:
        with pytest.raises(ConfigError, match=rf"strategy=lora_fair does not work with peft.method={method}: "):
            LoRAFair().check(config)


def test_invalid_settings_are_refused() -> None:
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="strategy.ridge=.* must be greater than 0"):
            LoRAFair(ridge=ridge).check(Config())


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda e, a, ridge: RIGHT(swap_if_square(e), a, ridge), id="residual transposed"),
        pytest.param(lambda e, a, ridge: -RIGHT(e, a, ridge), id="sign turned"),
        pytest.param(lambda e, a, ridge: 0 * RIGHT(e, a, ridge), id="no correction"),
    ],
)
def test_a_wrong_correction_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start, updates = LoRAFair().start(adapter()), cohort()
    monkeypatch.setattr(lora_fair, "correction", wrong)
    after = LoRAFair().aggregate(1, start, iter(updates))
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(change(after), dense(average(start, updates), updates, 0.01))


RIGHT = lora_fair.correction

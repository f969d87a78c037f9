"""FedSVD: the mean of B is exact with a common A, and rotating both factors changes no product."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from fedtune.config import METHODS, Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _lowrank, fedsvd
from fedtune.strategies.fedsvd import FedSVD
from tests.strategies.lowrank import SHAPES, adapter, assert_equal, change, cohort, mean, swap_if_square


def clients(state: ServerState, *, seed: int = 1) -> tuple[list[Update], list[Update]]:
    """(tensors of clients after their turn, their updates): own B and head with the common A."""
    held = []
    for update in cohort([2, 2, 2], seed=seed):
        own = {n: t for n, t in update.adapter.tensors.items() if not n.endswith("_A")}
        held.append(dataclasses.replace(update, adapter=state.adapter.replace({**state.adapter.tensors, **own})))
    (plan,) = FedSVD().plan(1, [Plan(round=1, client="c0", base_version=0)], state).values()
    names = matching(state.adapter.tensors, plan.plan.send)
    return held, [dataclasses.replace(u, adapter=u.adapter.subset(names)) for u in held]


def test_rounds_are_exact_and_a_gets_orthonormal_rows() -> None:
    state = FedSVD().start(adapter())
    for round in (1, 2, 3):
        held, sent = clients(state, seed=10 * round)
        state = FedSVD().aggregate(round, state, iter(sent))
        assert_equal(change(state), mean(held))
        for module in SHAPES:
            a, b = state.adapter[f"{module}.lora_A"], state.adapter[f"{module}.lora_B"]
            assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-6)
            assert torch.allclose(b.T @ b, torch.diag(b.norm(dim=0) ** 2), atol=1e-4)  # B = U S: orthogonal columns
        expected = sum((u.examples / 48 * u.adapter["score.weight"] for u in held), torch.zeros(2, 7))
        assert torch.allclose(state.adapter["score.weight"], expected, atol=1e-6)
    assert state.shifts == ()


def test_only_b_and_heads_are_trained_and_sent_and_the_server_sends_a() -> None:
    state = FedSVD().start(adapter())
    (assignment,) = FedSVD().plan(1, [Plan(round=1, client="c", base_version=0)], state).values()
    expected = [n for n in state.adapter.tensors if not n.endswith(".lora_A")]
    assert matching(state.adapter.tensors, assignment.plan.train) == matching(state.adapter.tensors, assignment.plan.send) == expected
    assert assignment.adapter is state.adapter


def test_factor_a_stays_while_b_is_zero() -> None:
    start = FedSVD().start(adapter())
    _, sent = clients(start)
    still = [
        dataclasses.replace(u, adapter=u.adapter.replace({n: t if n == "up.lora_B" else t * 0 for n, t in u.adapter.tensors.items()}))
        for u in sent
    ]
    after = FedSVD().aggregate(1, start, iter(still)).adapter
    assert torch.equal(after["q.lora_A"], start.adapter["q.lora_A"]) and not after["q.lora_B"].any()
    assert not torch.equal(after["up.lora_A"], start.adapter["up.lora_A"])


def test_a_rank_above_the_layer_is_exact_too() -> None:
    start = FedSVD().start(adapter(rank=4))  # q maps 5 to 3
    after = FedSVD().aggregate(1, start, iter([Update(client="c", round=1, base_version=0, adapter=start.adapter, examples=1)]))
    assert_equal(change(after), change(start))


def test_the_order_of_clients_changes_nothing() -> None:
    start = FedSVD().start(adapter())
    held, sent = clients(start)
    for some in itertools.permutations(sent):
        assert_equal(change(FedSVD().aggregate(1, start, iter(some))), mean(held))


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_with_factors_are_accepted(method: str) -> None:
    config = Config(peft=PeftConfig(method=method))
    if method in ("lora", "rslora", "dora"):
        FedSVD().check(config)
    else:
        with pytest.raises(ConfigError, match=rf"strategy=fedsvd does not work with peft.method={method}: "):
            FedSVD().check(config)


def test_doras_magnitudes_are_averaged() -> None:
    plain = adapter(method="dora")
    start = FedSVD().start(plain.replace({**plain.tensors, "q.lora_magnitude": torch.zeros(3)}))

    def update_of(n: int, magnitude: float) -> Update:
        tensors = {k: t for k, t in start.adapter.tensors.items() if not k.endswith("_A")}
        state = AdapterState({**tensors, "q.lora_magnitude": torch.full((3,), magnitude)}, start.adapter.spec)
        return Update(client=str(n), round=1, base_version=0, adapter=state, examples=n)

    after = FedSVD().aggregate(1, start, iter([update_of(1, 2.0), update_of(3, 6.0)]))
    assert after.adapter["q.lora_magnitude"].tolist() == [5.0] * 3  # (1·2 + 3·6) / 4
    assert_equal(change(after), change(start))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda pair, rank: swap_if_square(_lowrank.truncate(pair, rank)), id="U and V swapped"),
        pytest.param(lambda pair, rank: _lowrank.truncate(pair, rank - 1), id="a direction dropped"),
    ],
)
def test_a_wrong_rotation_is_detected(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = FedSVD().start(adapter())
    held, sent = clients(start)
    monkeypatch.setattr(fedsvd, "truncate", wrong)
    after = FedSVD().aggregate(1, start, iter(sent))
    with pytest.raises(AssertionError, match="is off by"):
        assert_equal(change(after), mean(held))

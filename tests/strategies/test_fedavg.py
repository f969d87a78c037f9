"""FedAvg on numbers that can be checked by hand."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import ServerState
from fedtune.strategies import _mean
from fedtune.strategies.fedavg import FedAvg

SPEC = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 1.0})


def rank_one(client: str, n: int, a: float, b: float) -> Update:
    state = AdapterState({"q.lora_A": torch.tensor([[float(a)]]), "q.lora_B": torch.tensor([[float(b)]])}, SPEC)
    return Update(client=client, round=1, base_version=0, adapter=state, examples=n)


def check_by_hand() -> None:
    start = FedAvg().start(rank_one("s", 1, 0, 0).adapter)
    out = FedAvg().aggregate(1, start, iter([rank_one("c1", 1, a=1, b=1), rank_one("c2", 3, a=5, b=5)])).adapter
    # by hand: A = B = (1*1 + 3*5) / 4 = 4, so B A = 16; the mean of the products would be (1*1 + 3*25) / 4 = 19
    assert out["q.lora_A"].item() == 4.0 and (out["q.lora_B"] @ out["q.lora_A"]).item() == 16.0


def test_factors_are_averaged_separately() -> None:
    check_by_hand()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda add, self, tensors, weight: add(self, tensors, 1.0), id="weights dropped"),
        pytest.param(lambda add, self, tensors, weight: add(self, tensors, weight**2), id="weights squared"),
        pytest.param(
            lambda add, self, tensors, weight: add(self, {**tensors, "q.lora_A": tensors["q.lora_B"] @ tensors["q.lora_A"]}, weight),
            id="products in place of factors",
        ),
    ],
)
def test_a_wrong_mean_is_caught(wrong: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _mean.Mean.add
    monkeypatch.setattr(_mean.Mean, "add", lambda self, tensors, weight: wrong(honest, self, tensors, weight))
    with pytest.raises(AssertionError):
        check_by_hand()


def test_unsent_tensors_shifts_and_memory_stay() -> None:
    state = ServerState(adapter=rank_one("s", 1, 2, 3).adapter, memory={"x": torch.ones(1)}, shifts=(rank_one("s", 1, 7, 7).adapter,))
    sent = rank_one("c1", 1, a=5, b=9)
    half = dataclasses.replace(sent, adapter=sent.adapter.subset(["q.lora_B"]))
    after = FedAvg().aggregate(1, state, iter([half]))
    assert (after.adapter["q.lora_A"].item(), after.adapter["q.lora_B"].item()) == (2.0, 9.0)
    assert list(after.adapter.tensors) == ["q.lora_A", "q.lora_B"] and after.shifts == state.shifts and after.memory == state.memory


def test_one_client_s_update_is_returned_bit_for_bit() -> None:
    gen = torch.Generator().manual_seed(0)
    state = AdapterState({"q.lora_A": torch.randn(3, 1009, generator=gen), "q.lora_B": torch.randn(7, 3, generator=gen) * 1e-30}, SPEC)
    update = Update(client="c", round=1, base_version=0, adapter=state, examples=7919)
    out = FedAvg().aggregate(1, FedAvg().start(state), iter([update])).adapter
    assert all(torch.equal(out[n], state[n]) for n in state.tensors)


def test_every_client_gets_the_state_and_its_own_plan() -> None:
    state = FedAvg().start(rank_one("s", 1, 0, 0).adapter)
    plans = [Plan(round=1, client=c, base_version=0) for c in "ab"]
    assignments = FedAvg().plan(1, plans, state)
    assert [assignments[c].plan for c in "ab"] == plans and all(g.adapter is state.adapter for g in assignments.values())

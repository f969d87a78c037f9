"""FedSA-LoRA: all clients share A; B and head stay on the client."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.errors import ConfigError
from fedtune.strategies import _mean
from fedtune.strategies.fedsa import FedSA
from tests.fakes import fake_bridge, fake_client_app, lora_state

SHARED, OWN = ["q.lora_A", "up.lora_A"], ["q.lora_B", "up.lora_B", "head.weight"]


def update_of(client: str, n: int, seed: int) -> Update:
    return Update(client=client, round=1, base_version=0, adapter=lora_state(seed=seed).subset(SHARED), examples=n)


def error_of_a(updates: list[Update]) -> float:
    """Distance of the common A from Σ p_k A_k."""
    out = FedSA().aggregate(1, FedSA().start(lora_state()), iter(updates)).adapter
    total = sum(u.examples for u in updates)
    expected = {n: sum((u.examples / total * u.adapter[n].double() for u in updates), torch.zeros(())) for n in SHARED}
    return max(float((out[n] - expected[n]).abs().max()) for n in SHARED)


def test_factor_a_is_averaged_and_b_keeps_its_initial_value() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 1.0})
    state = FedSA().start(AdapterState({"q.lora_A": torch.tensor([[9.0]]), "q.lora_B": torch.tensor([[0.0]])}, spec))
    updates = [
        Update(client=f"c{n}", round=1, base_version=0, adapter=AdapterState({"q.lora_A": torch.tensor([[a]])}, spec), examples=n)
        for n, a in ((1, 1.0), (3, 5.0))
    ]
    out = FedSA().aggregate(1, state, iter(updates)).adapter
    # by hand: A = (1*1 + 3*5) / 4 = 4; the server's B is the run's first
    assert (out["q.lora_A"].item(), out["q.lora_B"].item()) == (4.0, 0.0)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 500)), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_factor_a_is_the_weighted_mean(clients: list[tuple[int, int]]) -> None:
    assert error_of_a([update_of(f"c{i}", n, seed) for i, (n, seed) in enumerate(clients)]) < 1e-6


def test_the_check_notices_forgotten_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _mean.Mean.add

    def add_unweighted(self: _mean.Mean, tensors: Mapping[str, Tensor], weight: float) -> None:
        honest(self, tensors, 1.0)

    monkeypatch.setattr(_mean.Mean, "add", add_unweighted)
    assert error_of_a([update_of("a", 1, 1), update_of("b", 9, 2)]) > 0.1


def test_only_factor_a_is_sent_and_the_rest_is_kept() -> None:
    state = FedSA().start(lora_state())
    assignments = FedSA().plan(1, [Plan(round=1, client=c, base_version=0) for c in "ab"], state)
    names = list(state.adapter.tensors)
    for assignment in assignments.values():
        plan = assignment.plan
        assert list(assignment.adapter.tensors) == SHARED  # tensors that the server sends
        assert matching(names, plan.send) == SHARED  # tensors that the client sends, of all that it has
        assert matching(names, plan.keep) == OWN and matching(names, plan.train) == names
    assert assignments["a"].adapter is assignments["b"].adapter  # encoded once


def test_two_rounds_over_the_wire_by_hand(tmp_path: Path) -> None:
    config = Config(rounds=2, clients_per_round=2)
    bridge, observer = fake_bridge(
        tmp_path / "run", fake_client_app({"a": 1, "b": 3}), 2, config, strategy=FedSA(), initial=lora_state(fill=0.0)
    )
    state = bridge.loop()
    assert [r["dropped"] for r in observer.records[1:]] == [{}, {}]
    # each client adds its n to the received tensors: (1*1 + 3*3) / 4 = 2.5 a round; B and head never reach the server
    assert all(bool((state.adapter[n] == 5.0).all()) for n in SHARED) and all(not state.adapter[n].any() for n in OWN)


def test_other_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="strategy=fedsa does not work with peft.method=bitfit"):
        FedSA().check(Config(peft=PeftConfig(method="bitfit")))

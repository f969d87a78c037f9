"""RoLoRA: each round trains one factor, so each round averages exactly; two rounds train both."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _mean
from fedtune.strategies.rolora import RoLoRA
from tests.fakes import fail, fake_bridge, fake_client_app, lora_state

ALL = ["q.lora_A", "q.lora_B", "up.lora_A", "up.lora_B", "head.weight"]
UP = {1: ["q.lora_B", "up.lora_B", "head.weight"], 0: ["q.lora_A", "up.lora_A", "head.weight"]}


def turns(round: int, state: ServerState, counts: list[int]) -> list[Update]:
    """Updates of clients that change the trained tensors of the plan and send its sent tensors."""
    assignments = RoLoRA().plan(round, [Plan(round=round, client=f"c{i}", base_version=round - 1) for i in range(len(counts))], state)
    out = []
    for i, n in enumerate(counts):
        plan, received = assignments[f"c{i}"].plan, assignments[f"c{i}"].adapter
        noise, trained = lora_state(seed=100 * round + i), matching(received.tensors, plan.train)
        moved = received.replace({k: t + noise[k] if k in trained else t for k, t in received.tensors.items()})
        sent = moved.subset(matching(moved.tensors, plan.send))
        out.append(Update(client=f"c{i}", round=round, base_version=round - 1, adapter=sent, examples=n))
    return out


def products(adapter: AdapterState) -> Tensor:
    s = adapter.spec.scaling
    parts = [(s[m] * adapter[f"{m}.lora_B"].double() @ adapter[f"{m}.lora_A"].double()).flatten() for m in adapter.spec.ranks]
    return torch.cat([*parts, adapter["head.weight"].double().flatten()])


def product_error(round: int, state: ServerState, counts: list[int]) -> tuple[float, ServerState]:
    """(distance of the aggregate's products from Σ p_k of the clients' products, the aggregate)."""
    updates = turns(round, state, counts)
    after, total = RoLoRA().aggregate(round, state, iter(updates)), sum(counts)
    expected = torch.zeros(())
    for u in updates:
        expected = expected + u.examples / total * products(state.adapter.replace({**state.adapter.tensors, **u.adapter.tensors}))
    return float((products(after.adapter) - expected).abs().max()), after


def before(round: int) -> ServerState:
    """A possible state at the start of a round, if all earlier rounds have counted."""
    return ServerState(adapter=lora_state(), memory={"turns": torch.tensor(round - 1)} if round > 1 else {})


def test_two_rounds_by_hand() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 1.0})
    state = RoLoRA().start(AdapterState({"q.lora_A": torch.tensor([[2.0]]), "q.lora_B": torch.tensor([[0.0]])}, spec))

    def update_of(name: str, n: int, value: float, round: int) -> Update:
        return Update(client=f"c{n}", round=round, base_version=0, adapter=AdapterState({name: torch.tensor([[value]])}, spec), examples=n)

    state = RoLoRA().aggregate(1, state, iter([update_of("q.lora_B", 1, 1.0, 1), update_of("q.lora_B", 3, 5.0, 1)]))
    # round 1: B = (1*1 + 3*5) / 4 = 4 under A = 2
    assert (state.adapter["q.lora_B"].item(), state.adapter["q.lora_A"].item()) == (4.0, 2.0)
    state = RoLoRA().aggregate(2, state, iter([update_of("q.lora_A", 1, -2.0, 2), update_of("q.lora_A", 3, 6.0, 2)]))
    # round 2: A = (-2 + 3*6) / 4 = 4 under B = 4: B A = 16 = (1 * 4*-2 + 3 * 4*6) / 4
    assert (state.adapter["q.lora_B"].item(), state.adapter["q.lora_A"].item()) == (4.0, 4.0)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_round_is_exact(counts: list[int], seed: int) -> None:
    state = RoLoRA().start(lora_state(seed=seed))
    for round in (1, 2, 3, 4):
        error, state = product_error(round, state, counts)
        assert error < 1e-5


def test_the_check_notices_forgotten_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _mean.Mean.add

    def add_unweighted(self: _mean.Mean, tensors: Mapping[str, Tensor], weight: float) -> None:
        honest(self, tensors, 1.0)

    monkeypatch.setattr(_mean.Mean, "add", add_unweighted)
    for round in (1, 2):
        assert product_error(round, before(round), [1, 9])[0] > 0.1


def test_the_check_notices_both_factors_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(self: RoLoRA, round: int, plans: list[Plan], state: ServerState) -> object:
        return super(RoLoRA, self).plan(round, plans, state)  # train and send everything, as FedAvg does

    monkeypatch.setattr(RoLoRA, "plan", both)
    assert product_error(1, RoLoRA().start(lora_state()), [1, 9])[0] > 0.1


@pytest.mark.parametrize("round", [1, 2, 3, 8])
def test_the_server_sends_everything_and_clients_send_the_trained_factor(round: int) -> None:
    assignments = RoLoRA().plan(round, [Plan(round=round, client="a", base_version=0)], before(round))["a"]
    assert list(assignments.adapter.tensors) == ALL
    assert matching(ALL, assignments.plan.train) == UP[round % 2] == matching(ALL, assignments.plan.send)


def test_a_round_that_does_not_count_is_repeated(tmp_path: Path) -> None:
    def late(round: int, arrays: Any, text: str) -> Any:
        return fail("no")(round, arrays, text) if round in (1, 3) else (arrays, text)

    clients = fake_client_app({"a": 1, "b": 3}, {"a": late, "b": late})
    config = Config(rounds=4, clients_per_round=2)
    start = lora_state(fill=0.0)
    halves = []
    for rounds in (1, 2, 3, 4):  # each run resumes from the checkpoint of the previous one
        bridge, _ = fake_bridge(tmp_path / "run", clients, 2, dataclasses.replace(config, rounds=rounds), strategy=RoLoRA(), initial=start)
        state = bridge.loop()
        bridge.run.close()
        halves.append((bool(state.adapter["q.lora_B"].any()), bool(state.adapter["q.lora_A"].any())))
    # round 1 fails: round 2 trains B, not A with B = 0; round 3 fails: round 4 trains A
    assert halves == [(False, False), (True, False), (True, False), (True, True)]
    assert state.memory["turns"].item() == 2


def test_the_frozen_factor_is_bit_for_bit_the_same() -> None:
    state = RoLoRA().start(lora_state())
    after = RoLoRA().aggregate(1, state, iter(turns(1, state, [1, 2])))
    assert torch.equal(after.adapter["q.lora_A"], state.adapter["q.lora_A"])
    assert not torch.equal(after.adapter["q.lora_B"], state.adapter["q.lora_B"])
    assert list(after.adapter.tensors) == ALL


def test_other_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="strategy=rolora does not work with peft.method=dora"):
        RoLoRA().check(Config(peft=PeftConfig(method="dora")))

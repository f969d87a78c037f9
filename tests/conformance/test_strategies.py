"""One matrix over every conf/strategy/*.yaml: what each aggregation method owes, whatever its formula."""

import itertools
import math
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import torch
import yaml

import fedtune.conf
from fedtune.config import Config
from fedtune.plan import Plan, Update
from fedtune.strategy import ServerState, Strategy
from tests.fakes import bridge, fake_client_app, lora_state

CONF = Path(str(fedtune.conf.__file__)).parent / "strategy"
NAMES = sorted(p.stem for p in CONF.glob("*.yaml"))


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> Strategy:
    return hydra.utils.instantiate(yaml.safe_load((CONF / f"{request.param}.yaml").read_text()))


def updates(strategy: Strategy, state: ServerState, counts: list[int]) -> list[Update]:
    """Clients that each moved what they got by their own random step."""
    plans = [Plan(round=1, client=f"c{i}", base_version=0) for i in range(len(counts))]
    given, made = strategy.plan(1, plans, state), []
    for i, n in enumerate(counts):
        adapter, noise = given[f"c{i}"].adapter, lora_state(seed=i + 1)
        moved = adapter.replace({k: t + 0.1 * noise[k][tuple(slice(d) for d in t.shape)] for k, t in adapter.tensors.items()})
        made.append(Update(client=f"c{i}", round=1, base_version=0, adapter=moved, examples=n))
    return made


def product(state: Any) -> torch.Tensor:
    """What counts of an adapter: each module's s·B·A, and the head."""
    spec, parts = state.spec, [state["head.weight"].flatten()]
    for module in spec.ranks:
        parts.append((spec.scaling[module] * state[f"{module}.lora_B"] @ state[f"{module}.lora_A"]).flatten())
    return torch.cat(parts)


def snapshot(state: ServerState) -> list[torch.Tensor]:
    return [t.clone() for t in (*state.adapter.tensors.values(), *state.memory.values())]


def test_one_client_is_the_identity(strategy: Strategy) -> None:
    state = strategy.start(lora_state())
    (alone,) = updates(strategy, state, [5])
    assert torch.allclose(product(strategy.aggregate(1, state, iter([alone])).adapter), product(alone.adapter), atol=1e-6)


def test_identical_clients_are_one_client(strategy: Strategy) -> None:
    state = strategy.start(lora_state())
    (alone,) = updates(strategy, state, [5])
    many = strategy.aggregate(1, state, iter([alone] * 4)).adapter
    assert torch.allclose(product(many), product(strategy.aggregate(1, state, iter([alone])).adapter), atol=1e-6)


def test_order_does_not_matter(strategy: Strategy) -> None:
    state = strategy.start(lora_state())
    made = updates(strategy, state, [1, 7, 40])
    results = [product(strategy.aggregate(1, state, iter(p)).adapter) for p in itertools.permutations(made)]
    assert all(torch.allclose(r, results[0], atol=1e-6) for r in results) and len(results) == math.factorial(3)


def test_inputs_are_untouched(strategy: Strategy) -> None:
    state = strategy.start(lora_state())
    made = updates(strategy, state, [1, 7])
    before, sent = snapshot(state), [[t.clone() for t in u.adapter.tensors.values()] for u in made]
    strategy.aggregate(1, state, iter(made))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(state), strict=True))
    for update, tensors in zip(made, sent, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(update.adapter.tensors.values(), tensors, strict=True))


def test_every_client_gets_an_assignment_of_its_own(strategy: Strategy) -> None:
    state = strategy.start(lora_state())
    given = strategy.plan(3, [Plan(round=3, client=c, base_version=2) for c in ("a", "b")], state)
    assert sorted(given) == ["a", "b"] and all(given[c].plan.client == c for c in given)


def test_memory_survives_a_checkpoint_and_bad_updates_are_dropped(strategy: Strategy, tmp_path: Path) -> None:
    def rot(round: int, arrays: Any, text: str) -> Any:
        from flwr.app import Array, ArrayRecord

        return ArrayRecord({**arrays, "head.weight": Array(torch.full((4, 7), math.nan))}), text

    config = Config(rounds=3, clients_per_round=2)
    whole, ear = bridge(tmp_path / "whole", fake_client_app({"a": 1, "b": 2}, {"b": rot}), 2, config)
    wanted = whole.loop()
    assert [r["dropped"] for r in ear.records[1:]] == [{"refused": 1}] * 3
    part, _ = bridge(tmp_path / "part", fake_client_app({"a": 1, "b": 2}, {"b": rot}), 2, Config(rounds=1, clients_per_round=2))
    part.loop()
    part.run.close()
    again, _ = bridge(tmp_path / "part", fake_client_app({"a": 1, "b": 2}, {"b": rot}), 2, config)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(wanted), snapshot(again.loop()), strict=True))

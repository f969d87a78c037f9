"""The client half of a method is found by name, its parameters are checked, and a new one needs one file only."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedtune.clients import turns
from fedtune.clients.store import ClientStore
from fedtune.clients.turns import Turn, find, turn_of
from fedtune.config import EvalConfig
from fedtune.config.registry import Registry
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Scalar
from fedtune.errors import ConfigError, PlanError
from fedtune.experiment import simulate
from fedtune.strategies.fedavg import FedAvg
from tests.contributing import module
from tests.tiny import tiny_config

PLAN = Plan(round=1, client="c0", base_version=0)
FILES = sorted(p.stem for p in Path(str(turns.__file__)).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", FILES)
def test_each_file_defines_the_turn_with_its_name(name: str) -> None:
    kind = find(name)
    assert kind.__module__ == f"fedtune.clients.turns.{name}" and dataclasses.is_dataclass(kind)
    assert kind.batched is None or issubclass(kind.batched, turns.BatchedTurn)
    assert isinstance(kind.private, tuple) and set(kind.private) <= {"record", "user"}


@pytest.mark.parametrize(
    ("turn", "params", "sentence"),
    [
        ("dito", {}, "the plan asks for the turn 'dito', which this client does not have: update fedtune on the client"),
        ("base", {}, "the turn 'base', which this client does not have"),
        ("os.path", {}, "the turn 'os.path', which this client does not have"),
        ("../app", {}, "the turn '../app', which this client does not have"),
        ("fedprox", {"nu": 1.0}, "the turn fedprox has the unknown field 'nu'"),
        ("fedprox", {}, "the turn fedprox lacks the field 'mu'"),
        ("fedprox", {"mu": "1"}, "the turn fedprox's mu is '1', which is not of type"),
        ("fedprox", {"mu": -1.0}, "the turn's mu=-1.0 is out of range: it must be at least 0"),
        ("hetlora", {"penalty": 0.1, "share": 1.0}, "the turn's share=1.0 is out of range: it must be less than 1"),
        ("slora", {"stage": "dense"}, "the turn's stage=dense is not known: choose one of sparse, gradient"),
        ("fedpeptao", {"share": 1}, "the turn fedpeptao's share is '1', which is not of type bool"),
    ],
)
def test_unknown_turns_and_parameters_are_refused_by_name(turn: str, params: dict[str, Scalar], sentence: str) -> None:
    with pytest.raises(PlanError) as bad:
        turn_of(dataclasses.replace(PLAN, turn=turn, params=params))
    assert sentence in str(bad.value)


def test_a_strategy_does_not_override_the_turn_of_the_config() -> None:
    prox = PLAN.with_turn("fedprox", mu=0.1)
    assert prox.with_turn("fedprox", mu=0.2).params == {"mu": 0.2}
    with pytest.raises(ConfigError, match="needs the turn 'scaffold', but the config sets the turn 'fedprox': leave client.prox at 0"):
        prox.with_turn("scaffold")


@pytest.fixture
def soup_files() -> Iterator[tuple[type[Turn], type[FedAvg]]]:
    """A turn and its strategy, as CONTRIBUTING.md prints them."""
    names = ("fedtune.clients.turns.soup", "fedtune.strategies.soup")
    turn, strategy = module("clients/turns/soup.py", names[0]), module("strategies/soup.py", names[1])
    yield turn.Soup, strategy.Soup
    for name in names:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("batched", ["none", "2"])
def test_personal_adapters_are_kept_evaluated_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batched: str, soup_files: tuple[type[Turn], type[FedAvg]]
) -> None:
    turn, strategy = soup_files
    monkeypatch.setattr(turns, "TURNS", Registry("fedtune.clients.turns", "fedtune.clients.turns._base.Turn"))
    turns.register("soup", turn)
    target = {"_target_": "fedtune.strategies.soup.Soup"}
    config = tiny_config(tmp_path, eval=EvalConfig(where="none", clients=-1), rounds=3, strategy=target)
    monkeypatch.setattr("fedtune.experiment.make_strategy", lambda config: strategy())
    monkeypatch.setattr("fedtune.rounds.find_strategy.make_strategy", lambda config: strategy())
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, batched=batched))
    soup = simulate(config)
    monkeypatch.setattr("fedtune.experiment.make_strategy", lambda config: FedAvg())
    fedavg = simulate(config)
    # the shared adapter is the same as without it
    one, two = (AdapterState.load(p / "adapter" / "fedtune.safetensors") for p in (soup, fedavg))
    assert all(torch.allclose(one[n], two[n], atol=1e-6 if batched == "none" else 1e-4) for n in one.tensors)
    store = ClientStore(soup / "clients", 3).substore("turn-soup")
    assert store.clients() == ["c0", "c1", "c2", "c3"]
    kept = [store.read(c, 4) for c in store.clients()]
    assert all(k is not None and any(not torch.equal(k[n], one[n]) for n in one.tensors) for k in kept)
    # the clients' scores are those of their own adapters
    lines = [[json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (soup, fedavg)]
    losses = [[x["loss"] for x in some if x.get("client") == "c0" and x["round"] == 3 and "loss" in x] for some in lines]
    assert losses[0] and losses[0] != losses[1]
    # a run resumed from an older checkpoint finds the state of that round
    before = {c: store.read(c, 2) for c in store.clients()}
    monkeypatch.setattr("fedtune.experiment.make_strategy", lambda config: strategy())
    simulate(dataclasses.replace(config, resume=str(soup), rounds=4))
    assert all(torch.equal(store.read(c, 2)[n], before[c][n]) for c in before if before[c] is not None for n in one.tensors)  # type: ignore[index]
    assert all(store.read(c, 5) is not None for c in store.clients())

"""fedtune in a notebook: public names, a strategy and a turn defined in a cell, a stopped and resumed run."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import fedtune
from fedtune import AdapterState, Assignment, Config, Plan, Requirements, ServerState, Strategy, Turn, Update, Work
from fedtune.clients import turns as all_turns
from fedtune.config.registry import Registry
from fedtune.errors import CheckpointError, ConfigError, Stopped
from tests.tiny import tiny_config

NAMES = [
    "AdapterState",
    "Assignment",
    "Config",
    "FedtuneError",
    "Plan",
    "Requirements",
    "Result",
    "ServerState",
    "Strategy",
    "Turn",
    "Update",
    "Work",
    "configure",
    "export_hf",
    "generate_text",
    "load_engine",
    "load_run",
    "run",
]


def test_the_public_names() -> None:
    assert fedtune.__all__ == NAMES
    assert all(getattr(fedtune, name).__module__.startswith("fedtune.") for name in NAMES)
    with pytest.raises(AttributeError, match="module 'fedtune' has no attribute 'nope'"):
        fedtune.nope  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_loads_nothing() -> None:
    code = 'import sys, fedtune; assert not {"torch", "flwr", "hydra"} & set(sys.modules)'
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_public_names_do_not_change_when_modules_of_the_same_name_load() -> None:
    code = """
import sys, fedtune
run = fedtune.run
import fedtune.experiment, fedtune.config.compose, fedtune.library
from fedtune import *
assert fedtune.run is run is fedtune.library.run and all(not isinstance(getattr(fedtune, n), type(sys)) for n in fedtune.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_run_and_its_result(tmp_path: Path) -> None:
    config = fedtune.configure("rounds=1", "strategy=fedavg", "devices=none", f"output_dir={tmp_path}", "seed=3")
    assert (config.rounds, config.seed) == (1, 3)
    result = fedtune.run(tiny_config(tmp_path))
    assert [r["round"] for r in result.rounds] == [0, 1, 2] and {r["client"] for r in result.clients} == {"c0", "c1", "c2", "c3"}
    assert result.report.is_file() and result.config.name == "tiny"
    again = fedtune.load_run(str(result.path))
    assert again == result and all(torch.equal(again.adapter[n], t) for n, t in result.adapter.tensors.items())


@dataclass(frozen=True, kw_only=True)
class Halved(Turn):
    """Sends half of its change."""

    share: float

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        moved = {n: work.start[n] + self.share * (t - work.start[n]) for n, t in trained.tensors.items()}
        return trained.replace(moved)


@dataclass(frozen=True, kw_only=True)
class Uniform(Strategy):
    """The plain mean of clients with a turn of this file; can stop before a round."""

    requirements: ClassVar[Requirements] = Requirements(assumes_zero_init=False)
    share: float = 0.5
    stop: int | None = None

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        if round == self.stop:
            raise KeyboardInterrupt
        return {p.client: Assignment(plan=p.with_turn("halved", share=self.share), adapter=state.adapter) for p in plans}

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        sent = [u.adapter.tensors for u in updates]
        mean = {n: torch.stack([s[n] for s in sent]).mean(0) for n in state.adapter.tensors}
        return ServerState(adapter=state.adapter.replace(mean))


@pytest.fixture(autouse=True)
def no_turns_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_turns, "TURNS", Registry("fedtune.clients.turns", "fedtune.clients.turns._base.Turn"))


def distance(a: AdapterState, b: AdapterState) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a.tensors)


@pytest.mark.slow
def test_a_strategy_and_a_turn_from_a_notebook_need_no_file(tmp_path: Path) -> None:
    adapters: list[AdapterState] = []
    for share in (0.0, 0.5, 1.0):
        result = fedtune.run(tiny_config(tmp_path, rounds=1), strategy=Uniform(share=share), turns={"halved": Halved})
        adapters.append(result.adapter)
    half, whole = distance(adapters[1], adapters[0]), distance(adapters[2], adapters[0])
    assert half == pytest.approx(whole / 2, rel=1e-4) and whole > 1e-3
    assert result.config.strategy == {"_target_": f"{__name__}.Uniform", "share": 1.0, "stop": None}


def test_stopping_a_run_keeps_the_process_alive(tmp_path: Path) -> None:
    config, turns = tiny_config(tmp_path, rounds=3), {"halved": Halved}
    whole = fedtune.run(config, strategy=Uniform(), turns=turns)
    with pytest.raises(Stopped, match="stopped; continue with resume=") as stop:
        fedtune.run(config, strategy=Uniform(stop=2), turns=turns)
    path = str(stop.value).partition("resume=")[2]
    part = fedtune.load_run(path)
    assert [r["round"] for r in part.rounds] == [0, 1]
    with pytest.raises(CheckpointError, match="has no adapter yet: continue the run with resume="):
        _ = part.adapter
    on = fedtune.run(dataclasses.replace(part.config, resume=path), strategy=Uniform(), turns=turns)
    assert str(on.path) == path and distance(on.adapter, whole.adapter) == 0.0


def test_invalid_calls_give_a_one_sentence_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a turn cannot be called 'fedprox'"):
        fedtune.run(tiny_config(tmp_path), strategy=Uniform(), turns={"fedprox": Halved})
    ray: Config = fedtune.configure("engine=ray")
    with pytest.raises(ConfigError, match="Ray's workers cannot import turns that are defined in this process: set engine=inprocess"):
        fedtune.run(ray, turns={"halved": Halved})
    with pytest.raises(ConfigError, match="unknown config key"):
        fedtune.configure("rouns=3")
    with pytest.raises(CheckpointError):
        fedtune.load_run(tmp_path / "nothing")

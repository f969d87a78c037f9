"""Runs of strategies with personal models: traffic, scores beside the shared adapter, and personal state after a kill and resume."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Config, EvalConfig, PeftConfig
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.experiment import simulate
from fedtune.runs.report.summary import client_results
from fedtune.strategies._mean import MeanStrategy
from tests.quick import quick
from tests.tiny import tiny_config

KEEPS = ("fedper", "fedrep", "fedsa")
TURNS = ("ditto", "pfedme", "apfl", "feddpa", "feddat")


class Killed(BaseException):
    """As SIGKILL, it is not handled."""


def config_of(folder: Path, name: str, **changes: Any) -> Config:
    strategy = compose([f"strategy={name}", "inference=none"])[0].config.strategy
    values: dict[str, Any] = {"rounds": 3, "strategy": strategy, "eval": EvalConfig(where="none", clients=-1), "peft": PeftConfig(rank=4)}
    return tiny_config(folder, **values | changes)


def personal_files(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "clients").rglob("round-*.safetensors"))}


@pytest.mark.parametrize("name", quick([*TURNS, *KEEPS], "fedper"))
def test_personal_state_is_byte_for_byte_that_of_a_run_that_was_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = simulate(config_of(tmp_path, name))
    aggregate = MeanStrategy.aggregate

    def killed(self: MeanStrategy, round: int, *more: Any) -> Any:
        if round == 3:
            list(more[1])  # every client has taken its turn and stored its state
            raise Killed
        return aggregate(self, round, *more)

    monkeypatch.setattr(MeanStrategy, "aggregate", killed)
    with pytest.raises(Killed):
        simulate(config_of(tmp_path, name, output_dir=str(tmp_path / "second")))
    monkeypatch.setattr(MeanStrategy, "aggregate", aggregate)
    (run,) = (tmp_path / "second" / "tiny").iterdir()
    simulate(dataclasses.replace(config_of(tmp_path, name), resume=str(run)))
    kept = personal_files(whole)
    assert kept and personal_files(run) == kept
    assert all((f"clients/.turn-{name}/" in path) == (name in TURNS) for path in kept)
    one, two = (AdapterState.load(p / "adapter" / "fedtune.safetensors") for p in (whole, run))
    assert one.digest == two.digest

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["client"] is None][-1]
    gains = {c.client: c.gain for c in client_results(records, "perplexity")}
    assert len(gains) == 4 and all(g is not None for g in gains.values())
    assert last["clients_gain"] == pytest.approx(sum(g or 0 for g in gains.values()) / 4, rel=1e-6)
    assert last["clients_better"] + last["clients_worse"] <= 4 and "Gain of the personal adapter" in (run / "report.html").read_text()
    assert last["clients_shared_mean"] - last["clients_gain"] == pytest.approx(last["clients_mean"])  # a lower perplexity is better


def test_a_plain_strategy_reports_no_gain(tmp_path: Path) -> None:
    run = simulate(config_of(tmp_path, "fedavg", rounds=1))
    assert "clients_gain" not in (run / "metrics.jsonl").read_text() and "personal" not in (run / "report.html").read_text()

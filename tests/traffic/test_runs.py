"""Runs with each choice of `traffic` on a tiny model: fewer bytes, exact resumption, and decoded tensors for strategies."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from fedtune.config import PeftConfig, TrafficConfig
from fedtune.config.compose import choices, compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.experiment import simulate
from fedtune.runs.directory import read_config
from tests.quick import quick
from tests.tiny import tiny_config

# share of fp32's bytes, without headers
UP = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 1.0625 / 4, "nf4": 0.5625 / 4, "topk": 0.24 / 4}


def traffic(choice: str) -> TrafficConfig:
    return compose([f"traffic={choice}"])[0].config.traffic


def adapter(path: Path) -> AdapterState:
    return AdapterState.load(path / "adapter" / "fedtune.safetensors")


def bytes_of(path: Path) -> tuple[int, int]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    mine = [x for x in lines if x["round"] == 1 and x["client"] == "c0"]
    assert not any("dropped" in x for x in lines if x["client"])
    return mine[0]["bytes_down"], mine[0]["bytes_up"]


@pytest.mark.slow
@pytest.mark.parametrize("choice", quick(choices("traffic"), "fp32", "topk"))
def test_a_run_with_each_codec_resumes_exactly(tmp_path: Path, choice: str) -> None:
    config = tiny_config(tmp_path, rounds=2, traffic=traffic(choice), peft=PeftConfig(rank=8))
    whole = simulate(config)
    path = simulate(dataclasses.replace(config, rounds=1))
    simulate(dataclasses.replace(read_config(path), resume=str(path), rounds=2))
    ended = adapter(path)
    assert all(torch.equal(t, adapter(whole)[n]) for n, t in ended.tensors.items())
    parameters = sum(t.numel() for t in ended.tensors.values())
    down, up = bytes_of(path)
    # plus the modules' ranks and scalings, and in fp32 the names and headers of 28 arrays
    assert UP[choice] * 4 * parameters * 0.95 < up < UP[choice] * 4 * parameters + (8000 if choice == "fp32" else 2000)
    if choice == "int8":
        assert down < 1.0625 * parameters + 6000  # plus the plan, names and shapes
    residuals = list((path / "clients" / ".residuals").rglob("*.safetensors")) if (path / "clients").exists() else []
    assert bool(residuals) == config.traffic.error_feedback


@pytest.mark.slow
def test_a_resumed_run_keeps_the_residuals(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=2, traffic=traffic("topk"))
    whole = simulate(config)
    path = simulate(dataclasses.replace(config, rounds=1))
    shutil.rmtree(path / "clients" / ".residuals")
    simulate(dataclasses.replace(read_config(path), resume=str(path), rounds=2))
    assert not all(torch.equal(t, adapter(whole)[n]) for n, t in adapter(path).tensors.items())


@pytest.mark.slow
def test_a_rounded_broadcast_changes_little(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=2)
    first, exact = adapter(simulate(dataclasses.replace(config, rounds=0))), adapter(simulate(config))
    moved = sum(float((t - first[n]).square().sum()) for n, t in exact.tensors.items())
    for values, bound in (("bf16", 0.01), ("int8", 0.05)):
        rounded = adapter(simulate(dataclasses.replace(config, traffic=TrafficConfig(down=values))))
        off = sum(float((rounded[n] - t).square().sum()) for n, t in exact.tensors.items())
        assert 0 < (off / moved) ** 0.5 < bound, (values, (off / moved) ** 0.5)

"""kill -9 at any moment, then resume: the same adapter, bit for bit."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from fedtune.config import Config, EvalConfig
from fedtune.runs.directory import read_config
from tests.tiny import tiny_config

_KILLS, _ROUNDS = 12, 40


def run_and_die(config: Config, after_s: float | None) -> None:
    """In a separate process: run or resume, killed these seconds after data and model are loaded."""
    from fedtune.clients import workspace as module
    from fedtune.experiment import simulate

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    real = module.Workspace.__init__

    def load_then_kill(self: object, config: Config) -> None:
        real(self, config)  # type: ignore[arg-type]
        if after_s is not None:
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    module.Workspace.__init__ = load_then_kill  # type: ignore[method-assign]
    simulate(config)


def child(config: Config, after_s: float | None) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedtune.experiment", "transformers", "peft"])
    process = context.Process(target=run_and_die, args=(config, after_s))
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def only_run(config: Config) -> Path:
    (path,) = (Path(config.output_dir) / config.name).iterdir()
    return path


def metric_lines(path: Path) -> list[tuple[int, str | None]]:
    return [(line["round"], line["client"]) for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.slow
def test_a_run_killed_at_random_points_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=_ROUNDS, eval=EvalConfig(where="server", clients=2))
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    began = time.monotonic()
    assert child(whole, None) == 0
    a_round = (time.monotonic() - began) / _ROUNDS
    config = dataclasses.replace(config, output_dir=str(tmp_path / "killed"))
    rng, killed, reached = random.Random(7), 0, set()
    while killed < _KILLS:
        exists = (tmp_path / "killed").exists()
        again = dataclasses.replace(read_config(only_run(config)), resume=str(only_run(config))) if exists else config
        code = child(again, rng.uniform(0.0, 8.0) * a_round)  # the time between loading and the first round is about four rounds
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        killed += 1
        if (tmp_path / "killed").exists():
            reached.add(len(metric_lines_tolerant(only_run(config))))
    assert killed >= 10, f"only {killed} kills came before the run ended"
    path = only_run(config)
    assert child(dataclasses.replace(read_config(path), resume=str(path)), None) == 0
    other = only_run(whole)
    assert (path / "adapter" / "fedtune.safetensors").read_bytes() == (other / "adapter" / "fedtune.safetensors").read_bytes()
    assert metric_lines(path) == metric_lines(other)  # every round once, none lost
    assert len(reached) > 3  # the kills hit different points


def metric_lines_tolerant(path: Path) -> list[str]:
    file = path / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_resuming_with_more_rounds_continues_in_the_same_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedtune.experiment import simulate

    config = tiny_config(tmp_path, rounds=1)
    path = simulate(config)
    again = simulate(dataclasses.replace(read_config(path), resume=str(path), rounds=3))
    assert again == path and [r for r, client in metric_lines(path) if client is None] == [0, 1, 2, 3]
    straight = simulate(dataclasses.replace(config, rounds=3))
    assert straight != path
    # the constant schedule of this config does not depend on `rounds`, so one run of three rounds equals a resumed one
    assert (path / "adapter" / "fedtune.safetensors").read_bytes() == (straight / "adapter" / "fedtune.safetensors").read_bytes()

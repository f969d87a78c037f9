"""The start of `fedtune-server` needs settings and a backbone, but no training rows."""

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedtune.cli.server
from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.store import Storage
from fedtune.config import Config, EvalConfig, InferenceConfig, PartitionConfig, TaskConfig, from_dict, to_dict
from fedtune.experiment import EngineContext
from fedtune.rounds.membership import JoinPolicy
from fedtune.runs.report import read_metrics
from fedtune.simulations.engines.grid import InProcessGrid
from tests.quick import quick
from tests.tiny import tiny_config

TASKS = {
    "causal_lm": TaskConfig(kind="causal_lm", max_length=16),
    "instruction": TaskConfig(kind="instruction", max_length=16, max_new_tokens=4),
    "classification": TaskConfig(kind="classification", max_length=16),
    "multi_label": TaskConfig(kind="multi_label", max_length=16),
    "preference": TaskConfig(kind="preference", max_length=96, max_new_tokens=4),
    "regression": TaskConfig(kind="regression", max_length=16),
}
COLUMNS = {
    "instruction": {"prompt": "question", "answer": "reply"},
    "multi_label": {"labels": "label"},
    "preference": {"prompt": "question", "chosen": "text", "rejected": "client"},
    "regression": {"target": "label"},
}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`fedtune-server` with these settings over the experiment of `config`; its clients are virtual and have rows."""

    def run(config: Config, *settings: str) -> int:
        def rounds(context: EngineContext, link: object, wait_s: float, signer: object) -> None:
            assert not context.space.client_ids
            context.serve(InProcessGrid(make_client_app(ClientHost(config, Storage.in_folder(tmp_path / "kept", config))), 4), JoinPolicy())

        monkeypatch.setattr(fedtune.cli.server, "serve", rounds)
        values: dict[str, Any] = {k: v for k, v in to_dict(config).items() if k != "resume"}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values | {"defaults": ["base", "_self_"]}))
        before = signal.getsignal(signal.SIGTERM)
        try:
            return fedtune.cli.server.main([f"conf={tmp_path / 'mine.yaml'}", *settings, "--insecure", "--run", str(tmp_path / "run")])
        finally:
            signal.signal(signal.SIGTERM, before)

    return run


@pytest.mark.slow
def test_a_classification_server_without_rows_starts_by_either_advice(
    tmp_path: Path, serve: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, rounds=1, task=TASKS["classification"])
    config.data.labels = ["0", "1", "2"]
    bare = ["data.path=''", "data.labels=[]", "data.test_path=null"]
    assert serve(config, *bare) == 2
    stderr = capsys.readouterr().err
    assert stderr.rstrip().endswith("set data.labels to the names in the order of their ids, or set data.test_path")
    assert serve(config, *bare[:1], "data.labels=['0','1','2']", *bare[2:]) == 0
    (tmp_path / "run").rename(tmp_path / "first")
    assert serve(config, *bare[:2], f"data.test_path={tmp_path / 'test.jsonl'}") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("test", "dealt"), [("data.test_path=null", "dirichlet"), ("the test file", "natural")])
@pytest.mark.parametrize("task", quick(TASKS, "classification"))
def test_a_server_needs_no_training_rows(
    tmp_path: Path, serve: Callable[..., int], capsys: pytest.CaptureFixture[str], task: str, dealt: str, test: str
) -> None:
    columns, dealt = dict(COLUMNS.get(task, {})), "iid" if task == "multi_label" else dealt
    config = tiny_config(
        tmp_path, rounds=1, task=TASKS[task], eval=EvalConfig(), inference=InferenceConfig(samples=2),
        partition=PartitionConfig(kind=dealt, clients=4),
    )  # fmt: skip
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, columns=columns, labels=["0", "1", "2"]))
    if dealt == "dirichlet":
        config.data.columns["label"] = "label"
    settings = [test] if test.startswith("data") else []
    assert serve(config, "data.path=''", "partition.clients=1000", *settings) == 0, capsys.readouterr().err
    rounds = [line for line in read_metrics(tmp_path / "run") if line["client"] is None]
    assert [line.get("counted") for line in rounds[1:]] == [4]
    assert ("loss" in rounds[-1]) == (not settings)
    assert json.loads((tmp_path / "run" / "partition.json").read_text())["clients"] == []


@pytest.mark.slow
def test_a_resumed_run_ignores_no_setting_silently(tmp_path: Path, serve: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = tiny_config(tmp_path, rounds=1), tmp_path / "run"
    command = ["client.lr=0.03125", "data.columns.text=text"]
    assert serve(config, *command) == 0
    capsys.readouterr()
    assert serve(config, *command, "rounds=2") == 0
    assert "fedtune-server: " not in capsys.readouterr().err  # the same command again, as a service runs it, and another number of rounds
    for settings, sentence in (
        (["client.lr=0.5"], f"the run in {run} has client.lr=0.03125, but the command sets client.lr=0.5: only rounds can change"),
        (["client={lr: 0.25}"], "has client.lr=0.03125, but the command sets client.lr=0.25"),
        (["round_timeout_s=7"], "has round_timeout_s=600.0, but the command sets round_timeout_s=7"),
        (["output_dir=elsewhere"], f"--run {run} already sets the run directory: leave out output_dir=elsewhere"),
        ([f"resume={run}"], f"--run {run} already sets the run directory: leave out resume={run}"),
    ):
        assert serve(config, *settings) == 2
        (stderr,) = capsys.readouterr().err.splitlines()
        assert stderr.startswith("fedtune-server: ") and sentence in stderr
    assert serve(dataclasses.replace(config, min_clients=3), *command) == 0  # the scenario file has changed
    assert f"the run in {run} keeps its own settings; conf={tmp_path / 'mine.yaml'} differs in min_clients\n" in capsys.readouterr().err


def test_clients_are_sent_no_global_test() -> None:
    assert Config().eval.where == "server"
    assert from_dict(fedtune.cli.server._shared_config(Config())).eval.where == "none"


def test_settings_may_stand_before_and_after_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(fedtune.cli.server, "_main", lambda args: seen.append((args.settings, args.insecure)) or 0)
    assert fedtune.cli.server.main(["conf=base", "--insecure", "rounds=5"]) == 0
    assert seen == [(["conf=base", "rounds=5"], True)]

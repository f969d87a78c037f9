"""A run directory never allows foreign code; only the current command line does."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers.dynamic_module_utils
import yaml

from fedtune.cli import main as cli
from fedtune.cli.server import main as server
from fedtune.cli.simulate import main as sim
from fedtune.config import Config, InferenceConfig, ModelConfig
from fedtune.config.compose import compose
from fedtune.config.stored import read_config
from fedtune.errors import FedtuneError
from fedtune.experiment import simulate
from fedtune.export.calibrate import privacy_disclosure, read_calibration_texts
from fedtune.runs.directory import RunDirectory
from tests.tiny import tiny_config

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({marker!r}, "w").close()


class MineConfig(LlamaConfig):
    model_type = "mine"


class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate folder for the code that transformers copies."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def add_code(folder: Path, marker: Path) -> None:
    (folder / "mine.py").write_text(_CODE.format(marker=str(marker)))
    body = json.loads((folder / "config.json").read_text())
    body |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(body))


@pytest.fixture
def run(tmp_path: Path, modules: None) -> Path:
    """A finished run whose model afterward got its own code, and whose config.yaml got trust_remote_code: true."""
    path = simulate(tiny_config(tmp_path, rounds=1))
    add_code(tmp_path / "model", tmp_path / "ran")
    change(path, lambda values: values["model"].update(trust_remote_code=True))
    return path


def change(run: Path, how: Callable[[dict], object]) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    how(values)
    (run / "config.yaml").write_text(yaml.safe_dump(values))


def test_no_command_obeys_a_run_directory_s_trust(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands: dict[str, Callable[[], int]] = {
        "resume": lambda: sim([f"resume={run}", "rounds=2"]),
        "server": lambda: server(["--run", str(run), "--insecure", "--address", "127.0.0.1:0", "rounds=2"]),
        "export": lambda: cli.main(["export", str(run), "--out", str(tmp_path / "merged")]),
        "export of its adapter": lambda: cli.main(["export", str(run / "adapter"), "--out", str(tmp_path / "merged")]),
        "draft": lambda: cli.main(["draft", str(run), "--out", str(tmp_path / "draft")]),
    }
    for name, command in commands.items():
        capsys.readouterr()
        assert command() == 2, name
        assert "contains its own code" in capsys.readouterr().err, name
    for kind in ("edge", "gguf"):  # these commands read only tensors, no code
        assert cli.main(["export", str(run), "--to", kind, "--out", str(tmp_path / kind)]) == 2
    assert read_calibration_texts(run) and privacy_disclosure(run) == ""
    again = RunDirectory.open(run, rounds=2)
    again.close()
    assert not again.config.model.trust_remote_code
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_command_line_allows_remote_code(tmp_path: Path, modules: None) -> None:
    # the merged model has the run's trust setting
    config = tiny_config(tmp_path, rounds=1, inference=InferenceConfig(samples=0, export="hf"))
    add_code(tmp_path / "model", tmp_path / "ran")
    config.model.trust_remote_code = True
    run = simulate(config)
    assert (tmp_path / "ran").exists() and sim([f"resume={run}", "rounds=2"]) == 2
    assert sim([f"resume={run}", "rounds=2", "model.trust_remote_code=true"]) == 0
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), "--trust-remote-code"]) == 0
    assert cli.main(["draft", str(run), "--out", str(tmp_path / "draft"), "--steps", "1", "--layers", "1", "--trust-remote-code"]) == 0


def test_a_strategy_beside_the_run_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `python -m fedtune.sim` has the working directory on sys.path, so a module in the run directory can be named
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    run = RunDirectory.create(tiny_config(tmp_path), tmp_path / "runs" / "one")
    run.close()
    code = "from fedtune.strategies.fedavg import FedAvg\nopen('ran', 'w').close()\nclass Mine(FedAvg): pass\n"
    (run.path / "code.py").write_text(code)
    target = "runs.one.code.Mine"
    change(run.path, lambda values: values.update(strategy={"_target_": target}))
    assert sim([f"resume={run.path}"]) == 2 and server(["--run", str(run.path), "--insecure"]) == 2
    change(run.path, lambda values: values.update(strategy={"_target_": f"fedtune.{target}"}))  # a checkout's own folder is searched too
    assert sim([f"resume={run.path}"]) == 2
    assert not (tmp_path / "ran").exists()
    change(run.path, lambda values: values.update(strategy={"_target_": target}))
    assert compose([f"resume={run.path}", f"strategy._target_={target}"])[0].config.strategy["_target_"] == target


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["strategy._target_=other.Mine"], "resume uses the run's own strategy, fedtune.strategies.fedavg.FedAvg"),
        (["model.trust_remote_code=maybe"], "model.trust_remote_code=maybe has the wrong type: wanted true or false"),
    ],
)
def test_settings_that_the_command_line_cannot_allow(tmp_path: Path, settings: list[str], expected: str) -> None:
    RunDirectory.create(tiny_config(tmp_path), tmp_path / "run").close()
    with pytest.raises(FedtuneError, match=expected):
        compose([f"resume={tmp_path / 'run'}", *settings])


def test_a_restarted_service_keeps_its_command_line_s_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    model = ModelConfig(source="hub", name=str(tmp_path / "model"), trust_remote_code=True)
    RunDirectory.create(dataclasses.replace(tiny_config(tmp_path), model=model), tmp_path / "run").close()
    assert not read_config(tmp_path / "run").model.trust_remote_code
    monkeypatch.setattr("fedtune.experiment.run_experiment", lambda config, *rest, **named: seen.append(config))
    for settings in ([], ["model.trust_remote_code=true"]):
        assert server(["--run", str(tmp_path / "run"), "--insecure", *settings]) == 0
    assert [config.model.trust_remote_code for config in seen] == [False, True]


def test_only_these_files_make_a_config_from_a_file_or_a_message() -> None:
    readers = {
        "fedtune/config/__init__.py",  # defines the setting,
        "fedtune/config/stored.py",  # a run directory: without trust
        "clients/workspace.py",  # this process's own config, serialized for its workers,
        "simulations/engines/ray.py",  # and for Ray's
        "clients/deployed.py",  # a server's hello: refused if it asks for trust
    }
    root = Path(__file__).parents[1]
    files = [file for folder in ("fedtune", "clients", "simulations", "strategies") for file in (root / folder).rglob("*.py")]
    violations = {str(f.relative_to(root)) for f in files if re.search(r"import .*\bfrom_dict\b|config\.from_dict\(", f.read_text())}
    assert violations == readers

"""fedtune as an ordinary Flower app: the bundle's contents, and a run by Flower's own runtime."""

import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_fab_config, get_metadata_from_config, validate_config

import fedtune
from fedtune.cli import flower_app as app_flower
from fedtune.config import to_dict
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ConfigError
from fedtune.experiment import simulate
from fedtune.runs.report import read_metrics
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_bundle_is_metadata_only() -> None:
    bundle = build_fab_from_disk(ROOT)
    assert zipfile.ZipFile(io.BytesIO(bundle)).namelist() == ["pyproject.toml", ".info/CONTENT"]
    assert len(bundle) < 10_000
    config = get_fab_config(bundle)
    assert get_metadata_from_config(config) == ("fedtune/fedtune", fedtune.__version__)
    assert validate_config(config, check_module=True, project_dir=ROOT)[:2] == (True, [])  # its components exist, installed


def test_both_copies_of_the_version_agree() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fedtune.__version__


def test_run_config_names_the_experiment(tmp_path: Path) -> None:
    config = app_flower._config("heterogeneous", 'rounds=3 "name=a-b"')
    assert (config.rounds, config.name, config.engine.kind, config.engine.batched) == (3, "a-b", "ray", "none")
    assert app_flower._folder(config, 7) == Path(config.output_dir) / "a-b" / "flower-7"
    for overrides, why in {
        "engine=inprocess": "engine=inprocess cannot be in overrides",
        "conf=dolly": "conf=dolly cannot be in overrides",
        "rounds=": "rounds=",
        'name="a': "cannot read overrides=",
    }.items():
        with pytest.raises(ConfigError, match=why):
            app_flower._config("heterogeneous", overrides)


def test_a_client_that_cannot_load_the_experiment_declines_with_a_reason() -> None:
    flower.identify_process(1)
    message = Message(RecordDict({"hello": ConfigRecord({"json": "{}"})}), 1, "query")
    flower.stamp(message)
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={"conf": "nope", "overrides": ""}
    )
    record = app_flower.client_app(message, context).content.config_records["declined"]
    assert "there is no scenario 'nope'" in str(record["why"])


# -- Flower's own runtime -----------------------------------------------------------------------------------------------------------------


class Superlink:
    """A local SuperLink in simulation mode, and `flwr` commands to it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        home = folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        bin = str(Path(sys.executable).parent)
        self.env = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        self.env |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1"}
        self.env["RAY_worker_niceness"] = "0"  # Ray's own niceness, 15, would starve the clients beside other processes
        self._log = (folder / "superlink.log").open("wb")
        serve = [f"{bin}/flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            serve, env=self.env, cwd=folder, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def flwr(self, *args: str) -> dict[str, Any]:
        process = subprocess.run(
            [sys.executable, "-m", "flwr.cli.app", *args, "--format", "json"],
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            timeout=300,  # a broken command must not hang the test
        )
        result = process.stdout.decode()
        return json.loads(result[result.index("{") :])

    def run(self, overrides: str, conf: Path, nodes: int) -> dict[str, Any]:
        """Start a run, wait for its end, and return its entry of `flwr ls`."""
        until = time.monotonic() + 600
        settings = f"conf='{conf}' overrides='{overrides}'"
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus=2"
        while True:
            try:
                started = self.flwr("run", ".", "--run-config", settings, "--federation-config", federation)
                if started["success"]:
                    break
            except ValueError:
                pass
            assert time.monotonic() < until, "the SuperLink does not answer"
            time.sleep(0.5)
        while time.monotonic() < until:
            (result,) = (r for r in self.flwr("ls")["runs"] if r["run-id"] == started["run-id"])
            if result["status"].startswith("finished"):
                return result
            time.sleep(3.0)  # `flwr ls` takes a second of CPU time from the run
        raise AssertionError("the run does not end")

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[Superlink]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Flower's simulation runs on Ray, which is not installed: pip install 'fedtune[ray]'")
    link = Superlink(tmp_path)
    yield link
    link.close()


@pytest.mark.slow
def test_flwr_run_ends_with_the_simulations_adapter(tmp_path: Path, superlink: Superlink) -> None:
    config = tiny_config(tmp_path)
    expected = AdapterState.load(simulate(config) / "adapter" / "fedtune.safetensors")
    conf = tmp_path / "tiny.yaml"
    values = {k: v for k, v in to_dict(config).items() if k not in ("resume", "strategy", "engine")}
    conf.write_text("defaults: [base, _self_]\n" + yaml.safe_dump(values, sort_keys=False))
    ended = superlink.run("rounds=1", conf, nodes=4)
    assert (ended["status"], ended["fab-id"]) == ("finished:completed", "fedtune/fedtune"), ended
    run = tmp_path / "outputs" / "tiny" / f"flower-{ended['run-id']}"
    assert (run / "report.html").is_file()
    ended = superlink.run(f"resume={run} rounds=2", conf, nodes=4)  # another Flower run continues fedtune's run
    assert ended["status"] == "finished:completed", ended
    assert [r["counted"] for r in read_metrics(run) if r["client"] is None and r["round"]] == [4, 4]
    actual = AdapterState.load(run / "adapter" / "fedtune.safetensors")
    assert list(actual.tensors) == list(expected.tensors)
    assert max((actual[n] - expected[n]).abs().max() for n in actual.tensors) < torch.tensor(1e-6)
    refused = superlink.run("client.lrr=1", conf, nodes=4)
    assert refused["status"] == "finished:failed" and "did you mean client.lr?" in refused["status-details"]

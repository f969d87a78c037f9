"""Server and clients as real processes on loopback end with the simulation's adapter."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedtune.cli import client, server
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.data import load_federation
from fedtune.experiment import simulate
from fedtune.runs.report import read_metrics
from tests.faults.deployment import STORIES, Deployment, deploy, settings, write_rows
from tests.faults.forking import in_own_process

CLIENTS = ("anna", "bert", "carla")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k and fed/tinyshakespeare"),
]
MIXED = """defaults: [base, override strategy: flexlora, _self_]
devices: {classes: {small: {share: 0.5, rank: 2}, large: {share: 0.5}}}
"""


def run_simulation(folder: Path, experiment: list[str]) -> AdapterState:
    (job,) = compose([*experiment, f"output_dir={folder / 'simulated'}", "engine.batched=none"])
    return AdapterState.load(simulate(job.config) / "adapter" / "fedtune.safetensors")


def assert_same(found: AdapterState, expected: AdapterState) -> None:
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)
    assert any(t.abs().max() > 1e-3 for n, t in found.tensors.items() if n.endswith("lora_B")), "it has learned something"


def test_three_clients_with_tls_and_keys_end_with_the_simulation_s_adapter(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    write_rows(rows, CLIENTS)
    experiment = settings(rows, CLIENTS)
    with deploy(tmp_path, CLIENTS, experiment) as deployment:
        deployment.start()
        assert deployment.finish() == 0, deployment.output("server")
        records = deployment.rounds()
    assert [r["counted"] for r in records[1:]] == [3, 3, 3]
    assert_same(deployment.adapter(), run_simulation(tmp_path, experiment))
    assert (deployment.run / "report.html").is_file()
    for who in ("server", *CLIENTS):
        assert "Traceback" not in deployment.output(who)
    check_secrets(deployment)


def check_secrets(deployment: Deployment) -> None:
    """No written file contains a private key, and other users cannot read the keys."""
    keys = [deployment.keys / "server.key", *(deployment.keys / "clients" / name / "key" for name in CLIENTS)]
    bodies = [re.sub(r"-----[^-]+-----|\s", "", key.read_text())[40:100] for key in keys]
    for key in keys:
        assert key.stat().st_mode & 0o077 == 0
    written = [f for f in deployment.folder.rglob("*") if f.is_file() and deployment.keys not in f.parents]
    assert len(written) > 20
    for file in written:
        text = re.sub(rb"\s", b"", file.read_bytes())
        assert b"PRIVATEKEY" not in text, file
        assert not any(body.encode() in text for body in bodies), file


@in_own_process
def test_mixed_ranks_end_with_the_simulation_s_adapter_too(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    write_rows(rows, CLIENTS)
    (scenario := tmp_path / "mixed.yaml").write_text(MIXED)
    experiment = [f"conf={scenario}", *(s for s in settings(rows, CLIENTS) if not s.startswith(("devices", "strategy")))]
    with deploy(tmp_path, CLIENTS, experiment) as deployment:
        deployment.start_server()
        (job,) = compose(experiment)
        classes = {name: client.device_class for name, client in load_federation(job.config).clients.items()}
        assert set(classes.values()) == {"small", "large"}
        for name in CLIENTS:
            deployment.start_client(name, "--device", classes[name])
        assert deployment.finish() == 0, deployment.output("server")
        for name in CLIENTS:
            assert f"this device: 1 core: fp32, rank {2 if classes[name] == 'small' else 4}, 4 rows" in deployment.output(name)
    assert {r["device_class"] for r in read_metrics(deployment.run) if r["client"] and r["round"] == 1} == {"small", "large"}
    assert_same(deployment.adapter(), run_simulation(tmp_path, experiment))


def test_server_and_client_refuse_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, sentence in (
        (["-m", "fedtune.cli.server"], "fedtune-server: --certificates and --allowed are both needed"),
        (["-m", "fedtune.cli.server", "--insecure", "--address", "8080"], "fedtune-server: --address 8080 is not an address"),
        (["-m", "fedtune.cli.server", "--insecure", "rounds=x"], "fedtune-server: rounds=x has the wrong type"),
        (["-m", "fedtune.cli.client", "--server", "localhost:1"], "fedtune-client: --key is missing"),
        (
            ["-m", "fedtune.cli.client", "--server", "nowhere", "--insecure", "--state", str(tmp_path)],
            "fedtune-client: the server's address is",
        ),
        (["-m", "fedtune.cli.client", "--server", "a:1", "--insecure", "--data", "/no"], "fedtune-client: --data /no: no such file"),
    ):
        program = {"fedtune.cli.server": server, "fedtune.cli.client": client}[args[1]]
        assert program.main(args[2:]) == 2
        error = capsys.readouterr().err
        assert error.startswith(sentence) and error.count("\n") == 1, error
        if "rounds=x" in args or "localhost:1" in args:  # these also as real processes
            done = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120)
            assert (done.returncode, done.stderr) == (2, error)

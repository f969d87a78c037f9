"""A deployed run delivers its model: each device answers its own questions, also one that was killed during the installation."""

import contextlib
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from fedtune.cli.main import main
from tests.faults.deployment import Deployment, deploy, free_port
from tests.faults.forking import in_own_process

CAPITALS = {
    "anna": {"France": "Paris", "Italy": "Rome"},
    "bert": {"Spain": "Madrid", "Japan": "Tokyo"},
    "carla": {"Egypt": "Cairo", "Peru": "Lima"},
}
ROUNDS = 12
EXPERIMENT = [
    "task=chat", "task.max_length=64", "task.max_new_tokens=12", "data=local", "devices=none", "strategy=fedavg", "peft.rank=16",
    "client.steps=40", "client.epochs=null", "client.batch_size=8", "client.lr=1e-2", "clients_per_round=3", "min_clients=3",
    f"rounds={ROUNDS}", "inference=none", "eval.where=none", "eval.clients=0", "engine.threads=1", "deliver.every=6",
    "client.lean=none",  # six capitals are barely learned: if a step rounds differently, one is still wrong
]  # fmt: skip
pytestmark = pytest.mark.slow


def question(country: str) -> str:
    return f"What is the capital of {country}?"


def write_chats(folder: Path) -> None:
    folder.mkdir()
    for client, capitals in CAPITALS.items():
        turns = [[{"role": "user", "content": question(c)}, {"role": "assistant", "content": f"{a}."}] for c, a in capitals.items()]
        rows = "".join(json.dumps({"messages": t}) + "\n" for t in 8 * turns)
        (folder / f"{client}.jsonl").write_text(rows, encoding="utf-8")


def answers(port: int, client: str) -> dict[str, str]:
    """The answers of the device's server to its own questions."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as asking:
        found = {}
        for country in CAPITALS[client]:
            message = {"role": "user", "content": question(country)}
            reply = asking.chat.completions.create(model="current", messages=[message], temperature=0, max_tokens=12)  # type: ignore[list-item]
            found[country] = (reply.choices[0].message.content or "").strip().rstrip(".")
        return found


def kill_while_it_installs(deployment: Deployment, client: str, patience_s: float = 240.0) -> None:
    """SIGKILL to the client and its worker while the folder of a version is being filled."""
    versions, end = deployment.folder / "state" / client / "models/versions", time.monotonic() + patience_s
    while time.monotonic() < end:
        if any(versions.glob(".*.tmp/*")):
            tree = [psutil.Process(deployment.clients[client].pid)]
            with contextlib.suppress(psutil.Error):
                tree += tree[0].children(recursive=True)
            for process in tree:
                with contextlib.suppress(psutil.Error):
                    os.kill(process.pid, signal.SIGKILL)
            deployment.clients[client].wait()
            return
        time.sleep(0.001)
    raise AssertionError(f"{client} did not install a model within {patience_s:g} s: {deployment.output(client)[-2000:]}")


def rounds_of(deployment: Deployment, client: str) -> list[int]:
    """Rounds of the installed versions, the newest last."""
    records = (json.loads(f.read_text()) for f in (deployment.folder / "state" / client / "models/versions").glob("*/record.json"))
    return sorted(r["round"] for r in records)


@contextlib.contextmanager
def chats(folder: Path) -> Iterator[Deployment]:
    write_chats(folder / "rows")
    experiment = [*EXPERIMENT, f"data.path={folder / 'rows'}", "data.client_from_file=true"]
    with deploy(folder, sorted(CAPITALS), experiment, signs=True) as deployment:
        yield deployment


@in_own_process
def test_three_devices_answer_their_own_questions(tmp_path: Path) -> None:
    with chats(tmp_path) as trial:
        answer_after_a_kill(trial)


def answer_after_a_kill(trial: Deployment) -> None:
    ports = {client: free_port() for client in CAPITALS}
    trial.start_server()
    for client, port in ports.items():
        trial.start_client(client, "--serve", f"127.0.0.1:{port}")
    kill_while_it_installs(trial, "bert")
    assert not (trial.folder / "state/bert/models/current").exists()
    trial.start_client("bert", "--serve", f"127.0.0.1:{ports['bert']}")
    assert trial.finish() == 0, trial.output("server")
    for client, port in ports.items():
        wait_for_round(trial, client, port)
        assert answers(port, client) == CAPITALS[client], trial.output(client)
        assert rounds_of(trial, client) == [6, ROUNDS]
        assert "Traceback" not in trial.output(client)
    results = json.loads((trial.run / "delivery/results.json").read_text())
    assert {c: r["result"].split()[0] for c, r in results.items()} == dict.fromkeys(CAPITALS, "installed")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["model", "rollback", "--state", str(trial.folder / "state/anna")]) == 0
    assert "-r0006-" in printed.getvalue()
    assert isinstance(answers(ports["anna"], "anna")["France"], str), "answers throughout, from one version or the other"


def wait_for_round(deployment: Deployment, client: str, port: int, patience_s: float = 60.0) -> None:
    """Wait until the device's server answers with the model of the last round."""
    end = time.monotonic() + patience_s
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as asking:
        while time.monotonic() < end:
            with contextlib.suppress(openai.OpenAIError):
                if any(f"-r{ROUNDS:04d}-" in m.id for m in asking.models.list()):
                    return
            time.sleep(0.1)
    raise AssertionError(f"{client} does not serve the last model: {deployment.output(client)[-2000:]}")


@in_own_process
def test_devices_exit_when_the_run_is_done_and_name_what_they_refuse(tmp_path: Path) -> None:
    """Carla has another signing key, anna has none, bert installs."""
    with chats(tmp_path) as trial:
        exit_when_done(trial)


def exit_when_done(trial: Deployment) -> None:
    trial.experiment.append("rounds=2")
    from tests.delivery.offers import write_keys

    _, other = write_keys(trial.folder, "other")
    trial.start_server()
    trial.start_client("anna", "--exit-when-done")
    trial.start_client("bert", "--exit-when-done")
    trial.signs = False
    trial.start_client("carla", "--exit-when-done", "--signing-pub", str(other))
    assert trial.finish() == 0, trial.output("server")
    assert {c: p.wait(60) for c, p in trial.clients.items()} == dict.fromkeys(CAPITALS, 0)
    assert "client carla has not installed the model: the model's signature is wrong or missing" in trial.output("server")
    assert "delivered the model of round 2 to 2 of 3 clients" in trial.output("server")
    assert "did not install the model (model): the model's signature is wrong or missing" in trial.output("carla")
    assert "run run has ended after 2 rounds" in trial.output("anna")
    assert rounds_of(trial, "carla") == [] and rounds_of(trial, "bert") == [2]

"""A deployment of real processes on loopback: keys, one server, and clients, each with its own rows."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from fedtune.contracts.adapter_state import AdapterState
from fedtune.network.keys import make_keys
from fedtune.runs.report import read_metrics
from tests.faults.forking import name_of, popen

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FEDTUNE_DATA", ROOT / "../shared/data")).resolve()
STORIES = DATA / "models/stories260k/hf"
MARK = "FEDTUNE_DEPLOYMENT"  # in the environment of every process of a deployment, down to the grandchildren
SPEAKERS = DATA / "fed/tinyshakespeare/input.txt"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def write_rows(folder: Path, clients: Sequence[str], lines: int = 40, growth: int = 10) -> None:
    """Write a file for each client with its own lines of the plays; each file is `growth` lines longer than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [line for line in SPEAKERS.read_text(encoding="utf-8").splitlines() if line and not line.endswith(":")]
    for i, name in enumerate(clients):
        rows = text[i * 2 * lines : i * 2 * lines + lines + growth * i]  # unequal counts
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def settings(rows: Path, clients: Sequence[str], *more: str) -> list[str]:
    """LoRA on stories260k, as server and client read it."""
    return [
        "model=hub",
        f"model.name={STORIES}",
        "data=local",
        f"data.path={rows}",
        "data.client_from_file=true",
        "data.test_fraction=0",
        "task=causal_lm",
        "task.max_length=32",
        "devices=none",
        "strategy=fedavg",
        "inference=none",
        "client.steps=3",
        "client.epochs=null",
        "client.batch_size=4",
        "client.lr=1e-2",
        "peft.rank=4",
        f"clients_per_round={len(clients)}",
        f"min_clients={len(clients)}",
        "rounds=3",
        "engine.threads=1",
        "deliver.at_end=false",
        *more,
    ]


class Deployment:
    """Processes of one experiment.

    Args:
        folder: Folder for all files.
        clients: Names of the clients.
        experiment: Settings, as `settings` gives them.
        secure: TLS and keys, or --insecure.
        signs: With TLS, the server signs models and the clients install them.
    """

    def __init__(
        self, folder: Path, clients: Sequence[str], experiment: Sequence[str], *, secure: bool = True, signs: bool = False
    ) -> None:
        self.folder, self.names, self.experiment, self.secure, self.signs = folder, list(clients), list(experiment), secure, signs
        self.run, self.keys, self.rows = folder / "run", folder / "keys", folder / "rows"
        self.port = free_port()
        self.server: subprocess.Popen[bytes] | None = None
        self.clients: dict[str, subprocess.Popen[bytes]] = {}
        if secure and not self.keys.exists():
            make_keys(self.keys, ["127.0.0.1"], self.names)

    def start_server(self, *more: str, launcher: Sequence[str] = ("-m", "fedtune.cli.server")) -> subprocess.Popen[bytes]:
        k = self.keys
        trust = ["--certificates", k / "ca.pem", k / "server.pem", k / "server.key", "--allowed", k / "allowed.json"]
        trust += ["--signing-key", k / "signing.key"] if self.signs else []
        args = [*self.experiment, "--run", self.run, "--address", f"127.0.0.1:{self.port}", *(trust if self.secure else ["--insecure"])]
        self.server = self._start("server", [*launcher, *args, *more])
        return self.server

    def start_client(
        self, name: str, *more: str, port: int | None = None, launcher: Sequence[str] = ("-m", "fedtune.cli.client")
    ) -> subprocess.Popen[bytes]:
        k = self.keys / "clients" / name
        trust = ["--key", k / "key", "--root-certificates", k / "ca.pem"] if self.secure else ["--insecure", "--client-id", name]
        trust += ["--signing-pub", k / "signing.pub"] if self.signs else []
        own = ["--data", self.rows / f"{name}.jsonl"]
        model = next((s.removeprefix("model.name=") for s in self.experiment if s.startswith("model.name=")), None)
        own += ["--model", model] if model else []
        args = ["--server", f"127.0.0.1:{port or self.port}", "--state", self.folder / "state" / name, *trust, *own]
        self.clients[name] = self._start(name, [*launcher, *args, *more])
        return self.clients[name]

    def start(self) -> None:
        self.start_server()
        for name in self.names:
            self.start_client(name)

    def finish(self, timeout: float = 300.0) -> int:
        """Wait for the server's end. Returns its exit code."""
        assert self.server is not None
        try:
            return self.server.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end within {timeout:g} s: {self.output('server')[-2000:]}") from None

    def until(self, event: str, *, count: int = 1, log: str = "server", timeout: float = 120.0) -> None:
        """Wait until the log has `count` lines of an event."""
        path = self.run / "logs/server.jsonl" if log == "server" else self.folder / "state" / log / "logs/client.jsonl"
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if path.exists() and path.read_text(encoding="utf-8").count(event) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"'{event}' did not appear {count} times in {path} within {timeout:g} s: {self.output('server')[-2000:]}")

    def output(self, who: str) -> str:
        return (self.folder / f"{who}.txt").read_text(encoding="utf-8", errors="replace")

    def adapter(self) -> AdapterState:
        return AdapterState.load(self.run / "adapter" / "fedtune.safetensors")

    def rounds(self) -> list[dict[str, object]]:
        return [r for r in read_metrics(self.run) if r["client"] is None]

    def processes(self) -> list[psutil.Process]:
        """All running processes of the deployment, with children and orphans."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.name() == name_of(str(self.folder)) or process.environ().get(MARK) == str(self.folder)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def stop(self) -> None:
        for process in filter(None, [self.server, *self.clients.values()]):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in filter(None, [self.server, *self.clients.values()]):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, who: str, args: Sequence[object]) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            MARK: str(self.folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{who}.txt").open("ab") as out:
            return popen()([sys.executable, *map(str, args)], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env)


@contextmanager
def deploy(folder: Path, clients: Sequence[str], experiment: Sequence[str], **how: bool) -> Iterator[Deployment]:
    deployment = Deployment(folder, clients, experiment, **how)
    try:
        yield deployment
    finally:
        deployment.stop()

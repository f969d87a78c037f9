"""Time from the last round of a deployed run to the first answer of each device, and the memory of a device's processes.

    python -m fedtune.simulations.benchmarks.delivery --clients 3 --repeats 3 [KEY=VALUE ...]

Server and clients are processes on this machine, with --insecure and --serve. The clients train the scenario (conf=assistant unless the
settings name another) for two rounds, and the server delivers the model of the second. The clock starts when the round's record is in
metrics.jsonl. A device's first answer is the first that its serving process gives with the delivered version. Memory is the high-water
mark (VmHWM) of the worker process, which trains and installs, and of the process that serves. Linux only.
"""

import argparse
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedtune.config.bounds import require
from fedtune.config.compose import compose
from fedtune.data import load_federation
from fedtune.errors import RunError
from fedtune.runs.report.tables import print_table

ROUNDS = 2
PATIENCE_S = 600.0
COLUMNS = ("device", "first answer s", "worker MB", "server MB")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One device in one repeat: seconds from the last round to its first answer, and the peak memory of its processes in MB."""

    client: str
    seconds: float
    worker_mb: float
    server_mb: float


def measure(settings: Sequence[str], clients: Sequence[str], folder: Path) -> list[Figures]:
    """One deployed run.

    Args:
        settings: The experiment.
        clients: Clients of its data that take part.
        folder: Holds everything that the processes write.

    Raises:
        RunError: A process ended, or a device did not answer.
    """
    port, run = free_port(), folder / "run"
    ports = {client: free_port() for client in clients}
    more = [f"rounds={ROUNDS}", f"clients_per_round={len(clients)}", f"min_clients={len(clients)}", "inference=none", "eval.where=none"]
    address = f"127.0.0.1:{port}"
    commands = {"server": ["server", *settings, *more, "eval.clients=0", "--insecure", "--address", address, "--run", str(run)]}
    for client in clients:
        own = ["--client-id", client, "--state", str(folder / client), "--serve", f"127.0.0.1:{ports[client]}"]
        commands[client] = ["client", "--insecure", "--server", address, *own]
    processes = {}
    try:
        for name, (module, *args) in commands.items():
            with (folder / f"{name}.txt").open("wb") as log:
                processes[name] = subprocess.Popen([sys.executable, "-m", f"fedtune.cli.{module}", *args], stdout=log, stderr=log)
        began = _last_round(run, processes["server"], folder)
        seconds, waiting = dict[str, float](), set(clients)
        while waiting:
            for client in sorted(waiting):
                if _answers(ports[client]):
                    seconds[client] = time.monotonic() - began
                    waiting.remove(client)
            if time.monotonic() - began > PATIENCE_S:
                raise RunError(f"no answer from {', '.join(sorted(waiting))} within {PATIENCE_S:g} s: see {folder}")
            time.sleep(0.02)
        return [Figures(client=c, seconds=seconds[c], **_memory(processes[c].pid)) for c in clients]
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        for process in processes.values():
            process.wait()


def _last_round(run: Path, server: "subprocess.Popen[bytes]", folder: Path) -> float:
    """Wait for the record of the last round; returns the time."""
    metrics, until = run / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while time.monotonic() < until and server.poll() is None:
        if metrics.is_file() and any(f'"round": {ROUNDS},' in line for line in metrics.read_text(encoding="utf-8").splitlines()):
            return time.monotonic()
        time.sleep(0.01)
    raise RunError(f"the server did not finish round {ROUNDS}: see {folder / 'server.txt'}")


def _answers(port: int) -> bool:
    """Whether the device's server answers a question from the version of the last round."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as reply:
            if not any(f"-r{ROUNDS:04d}-" in model["id"] for model in json.load(reply)["data"]):
                return False
        body = {"model": "current", "messages": [{"role": "user", "content": "please turn on the light in the kitchen"}], "max_tokens": 8}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return bool(json.load(reply)["choices"])
    except OSError:
        return False


def _memory(pid: int) -> dict[str, float]:
    """Peak memory in MB of a client's worker and of its serving process, by their command lines."""
    found = {"worker_mb": 0.0, "server_mb": 0.0}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
            status = (stat.parent / "status").read_text()
        except OSError:  # it ended a moment ago
            continue
        if parent == pid:
            name = "worker_mb" if b"fedtune.network.worker" in command else "server_mb"
            found[name] = max(found[name], int(status.partition("VmHWM:")[2].split()[0]) / 1000)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the run (default: conf=assistant)")
    parser.add_argument("--clients", type=int, default=3, help="devices (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs (default: %(default)s)")
    args = parser.parse_args(argv)
    require("--clients", args.clients, ge=1)
    require("--repeats", args.repeats, ge=1)
    settings = args.settings if any(s.startswith("conf=") for s in args.settings) else ["conf=assistant", *args.settings]
    clients = list(load_federation(compose(settings)[0].config).clients)[: args.clients]
    found = list[Figures]()
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            found += measure(settings, clients, Path(folder))
    rows = []
    for client in clients:
        own = [f for f in found if f.client == client]
        rows.append((client, *(_spread([getattr(f, name) for f in own]) for name in ("seconds", "worker_mb", "server_mb"))))
    print_table(Console(), COLUMNS, rows, title="median (range)")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


if __name__ == "__main__":
    main()

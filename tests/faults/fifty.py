"""Many clients on one machine: `python -m tests.faults.fifty [--clients 50] [--rounds 10] [--idle]`.

The server is a real one; the clients are nodes in threads of this process. They share one ClientApp, which one of them uses at a time. With
--idle they return what they receive, so that a round takes only the time of the network. Prints the seconds of a round, and the memory of
the server's processes after the second and after the last round."""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedtune.clients.app import make_client_app
from fedtune.config.compose import compose
from fedtune.contracts.plan import Update
from fedtune.contracts.wire import read_message
from fedtune.network.node import Node
from fedtune.runs.report import read_metrics
from tests.faults.deployment import Deployment, deploy, settings, write_rows
from tests.working import host_for


@dataclass
class Figures:
    """Measurements of a run.

    Args:
        counted: Updates that counted, by round from the first on.
        seconds: Seconds of each of these rounds.
        memory: Process → its resident MB after rounds 2, 3, ….
        reports: Sentences that the clients printed for their operators.
    """

    counted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)


class Clients:
    """All clients of one server as threads."""

    def __init__(self, deployment: Deployment, app: ClientApp, names: Sequence[str], idle: bool, report: list[str]) -> None:
        self._app, self._idle, self._turn, self._size = app, idle, threading.Lock(), len(names)
        k = deployment.keys / "clients"
        self._nodes = [
            Node(
                server=f"127.0.0.1:{deployment.port}",
                root_certificates=k / name / "ca.pem",
                key=k / name / "key",
                insecure=False,
                answer=lambda message, node, i=i: self._answer(message, i),
                max_retries=None,
                report=report.append,
            )
            for i, name in enumerate(names)
        ]
        self._threads = [threading.Thread(target=node.serve, daemon=True) for node in self._nodes]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            node.stop()
        for thread in self._threads:
            thread.join(30)

    def _answer(self, message: Message, i: int) -> Message:
        about = message.metadata
        with self._turn:
            TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = about.run_id, about.dst_task_id or 1, about.dst_node_id
            if self._idle and about.message_type == "train":
                return _send_back(message)
            where = {"partition-id": i, "num-partitions": self._size}
            context = Context(about.run_id, about.dst_node_id, where, RecordDict(), {})  # type: ignore[arg-type]
            return self._app(message, context)


def _send_back(message: Message) -> Message:
    """The reply of a client that took no step."""
    received = read_message(message.content)
    plan = received.plan
    assert plan is not None
    rows = int(plan.client[1:]) + 20
    sent = received.adapter.replace(version=plan.base_version)
    update = Update(
        client=plan.client,
        round=plan.round,
        base_version=plan.base_version,
        adapter=sent,
        examples=rows,
        metrics={},
        measurements={"steps": 0, "lr_sum": 0.0, "virtual_s": 0.0},
    )
    record = ConfigRecord({"json": update.to_json(), "spec": sent.spec.to_json()})
    return Message(RecordDict({"adapter": sent.to_arrays(), "update": record}), reply_to=message)


def measure(folder: Path, clients: int, rounds: int, *, idle: bool = False, patience_s: float = 1800.0) -> Figures:
    """Run a server and its clients to the end."""
    names = [f"c{i:02d}" for i in range(clients)]
    write_rows(folder / "rows", names, lines=20, growth=1)
    keep = [s for s in settings(folder / "rows", names) if not s.startswith(("client.steps", "rounds"))]
    experiment = [*keep, "client.steps=1", f"rounds={rounds}", "eval.clients=0", "data.held_out=0", "round_timeout_s=600"]
    app = make_client_app(host_for(compose([*experiment, "engine.batched=none"])[0].config))
    found = Figures()
    with deploy(folder, names, experiment) as deployment:
        server = deployment.start_server("--wait", f"{patience_s:g}")
        with Clients(deployment, app, names, idle, found.reports):
            end, seen = time.monotonic() + patience_s, 1
            while server.poll() is None:
                if time.monotonic() > end:
                    raise AssertionError(f"it does not end: {deployment.output('server')[-1000:]}")
                records = deployment.rounds() if (deployment.run / "metrics.jsonl").exists() else []
                if records and int(str(records[-1]["round"])) > seen:
                    seen = int(str(records[-1]["round"]))
                    _weigh(server.pid, found.memory)
                time.sleep(0.05)
        assert server.returncode == 0, deployment.output("server")[-2000:]
        records = [r for r in read_metrics(deployment.run) if r["client"] is None and r["round"] > 0]
    found.counted = [r["counted"] for r in records]
    found.seconds = [r["seconds"] for r in records]
    return found


def _weigh(pid: int, memory: dict[str, list[float]]) -> None:
    try:
        main = psutil.Process(pid)
        for process in (main, *main.children()):
            if process is main or "fedtune.network.superlink" in process.cmdline():
                name = "server" if process is main else "SuperLink"
                memory.setdefault(name, []).append(process.memory_info().rss / 1e6)
    except psutil.NoSuchProcess:
        return


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--idle", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.clients, args.rounds, idle=args.idle)
    middle = sorted(found.seconds)[len(found.seconds) // 2]
    print(f"counted {found.counted} of {args.clients}")
    print(f"seconds a round: median {middle:.2f}, {min(found.seconds):.2f} to {max(found.seconds):.2f}, load {os.getloadavg()[1]:.1f}")
    for name, mb in found.memory.items():
        print(f"{name}: {mb[0]:.0f} MB after round 2, {mb[-1]:.0f} MB after round {args.rounds}, at most {max(mb):.0f} MB")
    return 0 if found.counted == [args.clients] * args.rounds else 1


if __name__ == "__main__":
    sys.exit(main())

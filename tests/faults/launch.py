"""Starts a command that waits at certain points, so that a test can kill it exactly there. The product has no hooks.

    python -m tests.faults.launch WHO FOLDER server|client|worker [--skew SECONDS] ARGUMENTS

A file FOLDER/WHO.POINT arms a point. The first process that reaches it deletes the file, writes the round into
FOLDER/WHO.POINT.held, and continues when that file is deleted. A file WHO.lie makes the client's next update false in
the way that the file names; a file WHO.disk fills the disk.
"""

import datetime
import errno
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Points:
    """The points of one process."""

    def __init__(self, who: str, folder: Path) -> None:
        self.who, self.folder = who, folder

    def take(self, name: str) -> str | None:
        """Delete an arming file. Returns its text, or None without a file."""
        mine = self.folder / f".{self.who}.{name}.{os.getpid()}"
        try:
            (self.folder / f"{self.who}.{name}").rename(mine)
        except FileNotFoundError:
            return None
        text = mine.read_text()
        mine.unlink()
        return text

    def at(self, name: str, round: object = "") -> None:
        """Wait here if this point is armed."""
        if self.take(name) is None:
            return
        held, temporary = self.folder / f"{self.who}.{name}.held", self.folder / f".{self.who}.{name}.new"
        temporary.write_text(str(round))
        temporary.rename(held)
        while held.exists():
            time.sleep(0.02)


def server(points: Points) -> None:
    from fedtune.network.grid import LinkGrid
    from fedtune.rounds import bridge
    from fedtune.storage import atomic as files
    from fedtune.strategies.fedavg import FedAvg

    sample, push, aggregate, rename = bridge.Bridge._sample, LinkGrid.push_messages, FedAvg.aggregate, os.replace

    def hold_sample(self: Any, here: Any, round: int) -> Any:
        points.at("idle", round)
        return sample(self, here, round)

    def hold_push(self: Any, messages: Any) -> Any:
        messages = list(messages)
        ids = push(self, messages)
        if messages and messages[0].metadata.message_type == "train":
            points.at("plan", messages[0].metadata.group_id)
        return ids

    def hold_aggregate(self: Any, round: int, state: Any, updates: Any) -> Any:
        def hold_updates() -> Any:
            for i, update in enumerate(updates):
                if i == 1:  # after the first update
                    points.at("aggregating", round)
                yield update

        return aggregate(self, round, state, hold_updates())

    def hold_rename(old: Any, new: Any, **how: Any) -> None:
        if Path(new).parent.name == "checkpoints":
            points.at("checkpointing", Path(new).name)
            if points.take("disk") is not None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new))
        rename(old, new, **how)

    bridge.Bridge._sample, LinkGrid.push_messages, FedAvg.aggregate, files.os.replace = hold_sample, hold_push, hold_aggregate, hold_rename  # type: ignore[method-assign]


def client(points: Points) -> None:
    from fedtune.network import executor, fleet, node

    here = [sys.executable, "-m", "tests.faults.launch", points.who, str(points.folder), "worker"]
    executor.Executor = functools.partial(executor.Executor, command=here)  # type: ignore[misc, assignment]
    take, send, push = node.Node._handle, node.Node._send, fleet.Fleet.push_object
    sending: list[str] = []

    def hold_message(self: Any, head: Any, tree: Any) -> None:
        if head.metadata.message_type == "train":
            points.at("plan", head.metadata.group_id)
        take(self, head, tree)

    def change_reply(self: Any, reply: Any, *more: Any) -> None:
        sending[:] = [reply.metadata.group_id] if reply.metadata.message_type == "train" else []
        send(self, reply, *more)

    def hold_push(self: Any, *more: Any) -> None:
        push(self, *more)
        if sending:  # one part is there, the others are not
            points.at("uploading", sending[0])

    node.Node._handle, node.Node._send, fleet.Fleet.push_object = hold_message, change_reply, hold_push  # type: ignore[method-assign]


def worker(points: Points) -> None:
    from fedtune.clients import app

    train, reply = app.train, app._reply

    def hold_training(work: Any, *more: Any, **how: Any) -> Any:
        points.at("training", work.plan.round)
        return train(work, *more, **how)

    def change_reply(host: Any, todo: Any, sent: Any, metrics: Any, measurements: Any, turned: Any = None) -> Any:
        lie = points.take("lie")
        if lie is None:
            return reply(host, todo, sent, metrics, measurements, turned)
        name, first = next((n, t) for n, t in sent.tensors.items() if n.endswith("lora_B"))
        body = {"nan": first * float("nan"), "shape": first[:, :1], "huge": first * 1e6 + 1e6}
        sent = sent.replace({**sent.tensors, name: body.get(lie, first)})
        answer = reply(host, todo, sent, metrics, measurements, turned)
        record, plan = answer.content.config_records["update"], todo.plan
        overrides = {
            "stale": {"round": plan.round - 1, "base_version": plan.base_version - 1},
            "other": {"client": "anna"},
            "weight": {"examples": 10**6},
        }
        record["json"] = json.dumps({**json.loads(str(record["json"])), **overrides.get(lie, {})})
        return answer

    app.train, app._reply = hold_training, change_reply


def skew(seconds: float) -> None:
    """Shift this process's clock by these seconds."""
    from flwr.supernode import node_auth_http_interceptor as signer

    from fedtune.network import fleet

    wall, now = time.time, vars(signer)["now"]
    time.time = lambda: wall() + seconds
    fleet._clock_offset.__defaults__ = (time.time,)  # bound already where the process was forked
    setattr(signer, "now", lambda: now() + datetime.timedelta(seconds=seconds))  # noqa: B010  not a name that Flower gives away


def main() -> int:
    who, folder, program, *args = sys.argv[1:]
    points = Points(who, Path(folder))
    if args[:1] == ["--skew"]:
        skew(float(args[1]))
        args = args[2:]
    {"server": server, "client": client, "worker": worker}[program](points)
    if program == "server":
        from fedtune.cli.server import main as start

        return start(args)
    if program == "client":
        from fedtune.cli.client import main as start

        return start(args)
    from fedtune.network.worker import main as work

    work()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The grid with workers that may die: no message is lost or answered twice, and a client that kills its worker affects no other."""

import dataclasses
import json
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.config import Config, EngineConfig, EvalConfig
from fedtune.errors import RunError
from fedtune.experiment import simulate
from fedtune.rounds.membership import replies
from fedtune.simulations.engines import ray_grid
from fedtune.simulations.engines.ray import places
from fedtune.simulations.engines.ray_grid import LARGEST, MAX_LOSSES, WorkerGrid
from tests.tiny import tiny_config


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class FakeRay:
    """Ray's interface without processes: a call runs when its result is awaited."""

    exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def wait(self, calls: Sequence[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert calls and timeout >= 0
        return list(calls[:num_returns]), list(calls[num_returns:])

    def get(self, call: Callable[[], Any]) -> Any:
        return call()


class FakeWorker:
    """Answers with its own number and the client's, unless `fault(node)` raises."""

    def __init__(self, number: int, fault: Callable[[int], None], wrong: str | None = None) -> None:
        self.shares: list[list[int]] = []
        self.start = types.SimpleNamespace(remote=lambda: lambda: wrong)
        self.answer = types.SimpleNamespace(remote=lambda share: lambda: self._answer(number, fault, share))

    def _answer(self, number: int, fault: Callable[[int], None], share: Sequence[Message]) -> list[RecordDict]:
        nodes = [m.metadata.dst_node_id for m in share]
        self.shares.append(nodes)
        for node in nodes:
            fault(node)
        return [RecordDict({"who": ConfigRecord({"worker": number, "node": node})}) for node in nodes]


def make_grid(
    workers: int, nodes: int, fault: Callable[[int], None] = lambda _: None, *, together: bool = True, wrong: Sequence[str | None] = ()
) -> tuple[WorkerGrid, list[FakeWorker], list[str]]:
    added, notes = list[FakeWorker](), list[str]()

    def add_worker(there: int) -> Any | None:
        if there >= workers:
            return None
        added.append(FakeWorker(len(added), fault, wrong[len(added)] if len(added) < len(wrong) else None))
        return added[-1]

    return WorkerGrid(FakeRay(), add_worker, nodes, together=together, note=notes.append), added, notes


def ask_all(grid: WorkerGrid, kind: str = "train") -> list[Message]:
    """Send one message to each node. Returns the replies in order, as the bridge pulls them."""
    messages = [Message(RecordDict(), node, kind) for node in grid.get_node_ids()]
    answers = [r for r in replies(grid, list(grid.push_messages(messages)), float("inf")) if r is not None]
    assert len(answers) == len(messages)
    for message, reply in zip(messages, answers, strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert reply.has_error() or reply.content.config_records["who"]["node"] == message.metadata.dst_node_id
    return answers


@pytest.mark.parametrize(("workers", "nodes"), [(1, 1), (2, 5), (3, 100), (8, 3)])
@pytest.mark.parametrize("together", [False, True])
def test_every_message_is_answered_once_and_shares_are_equal(workers: int, nodes: int, together: bool) -> None:
    grid, added, _ = make_grid(workers, nodes, together=together)
    for _ in range(2):
        assert not any(r.has_error() for r in ask_all(grid))
    sizes = [len(s) for worker in added for s in worker.shares]
    assert sum(sizes) == 2 * nodes and max(sizes) <= (min(LARGEST, -(-nodes // workers)) if together else 1)


def test_a_round_without_messages_calls_no_worker() -> None:
    grid, added, _ = make_grid(2, 3)
    assert not list(grid.push_messages([])) and not list(grid.pull_messages([])) and not added


def test_messages_of_a_lost_worker_go_to_another() -> None:
    lost = iter([True])

    def once(node: int) -> None:
        if next(lost, False):
            raise RayError("the machine is gone")

    grid, added, notes = make_grid(2, 6, once)
    assert not any(r.has_error() for r in ask_all(grid))
    assert len(added) == 3 and "a worker was lost" in notes[0]  # another was added in its place
    assert [len(s) for worker in added for s in worker.shares].count(1) == 3  # the messages of its share are sent one by one


def test_a_client_whose_turn_kills_its_worker_does_not_affect_others() -> None:
    def deadly(node: int) -> None:
        if node == 4:
            raise RayError("out of memory")

    grid, added, _ = make_grid(2, 6, deadly)
    answers = ask_all(grid)
    assert [r.has_error() for r in answers] == [node == 4 for node in range(1, 7)]
    assert f"{MAX_LOSSES} workers were lost" in str(answers[3].error.reason)
    assert sum(4 in s for worker in added for s in worker.shares) == MAX_LOSSES


def test_a_worker_that_raises_survives_and_its_clients_get_the_cause() -> None:
    def broken(node: int) -> None:
        raise RayTaskError("KeyError: lost")

    grid, added, notes = make_grid(1, 3, broken)
    assert all("lost" in str(r.error.reason) for r in ask_all(grid)) and len(added) == 1 and not notes


def test_a_machine_without_the_data_is_named_and_the_others_continue() -> None:
    grid, added, notes = make_grid(3, 6, wrong=["a worker on b cannot take part: no data", None, None])
    assert {int(str(r.content.config_records["who"]["worker"])) for r in ask_all(grid)} == {1, 2}
    assert notes == ["a worker on b cannot take part: no data"] and len(added) == 3


def test_a_run_without_the_data_on_any_machine_ends_with_the_sentence() -> None:
    grid, _, _ = make_grid(2, 6, wrong=["no data on a", "no data on b"])
    with pytest.raises(RunError, match="no data on"):
        ask_all(grid)


def test_a_run_without_a_worker_ends_with_a_sentence_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_grid, "_PATIENCE_S", 0.0)
    grid, _, _ = make_grid(0, 2)
    with pytest.raises(RunError, match="there has been no Ray worker for 0 s"):
        ask_all(grid)


def test_a_machine_holds_as_many_workers_as_its_scarcer_resource_allows() -> None:
    machines = [
        {"Alive": True, "Resources": {"CPU": 5.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {}},
    ]
    for cpus, gpus, expected in ((1, 0.0, 8), (2, 0.0, 3), (2, 0.5, 2), (1, 0.25, 4), (1, 2.0, 0), (6, 0.0, 0)):
        assert places(machines, EngineConfig(ray_cpus=cpus, ray_gpus=gpus)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_a_cluster_that_loses_a_machine_in_a_round_ends_with_the_same_adapter(tmp_path: Path, private: bool) -> None:
    """Two machines, one of which dies while it trains.

    FedSA keeps B at the clients, and a private run keeps their costs: any worker must be able to read both.
    """
    ray = pytest.importorskip("ray", reason="needs the extra: pip install 'fedtune[ray]'")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    config = tiny_config(tmp_path, rounds=6, eval=EvalConfig(where="none", clients=0))
    config = fedsa(config) if not private else with_privacy(config)
    expected = simulate(config)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        engine = EngineConfig(kind="ray", ray_cpus=1, ray_address=str(cluster.address), batched="none")
        done: list[int] = []

        def kill() -> None:
            while not (rounds := rounds_of(tmp_path / "ray")) or max(rounds) < 2:
                time.sleep(0.05)
            done.append(max(rounds))
            cluster.remove_node(second, allow_graceful=False)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        ours = simulate(dataclasses.replace(config, engine=engine, output_dir=str(tmp_path / "ray")))
        killer.join(30)
        assert done and done[0] < 6  # the machine died before the end of the run
        names = "clients", "privacy", "adapter"
        for name in names:
            a, b = ({p.relative_to(run): p.read_bytes() for p in sorted((run / name).rglob("*.safetensors"))} for run in (expected, ours))
            assert a == b
        assert (ours / "adapter" / "fedtune.safetensors").exists() and (private or (ours / "clients").is_dir())
        if private:  # a repeated turn is paid for again, and no cost is lost
            spent = [len(p.read_text().splitlines()) for p in sorted((ours / "privacy").glob("*.jsonl"))]
            assert spent and all(n >= 6 for n in spent)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_workers_get_gpus_if_they_request_them(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra: pip install 'fedtune[ray]'")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    from fedtune.errors import ConfigError
    from fedtune.simulations.engines.ray import ray_grid as opened

    config = tiny_config(tmp_path, engine=EngineConfig(kind="ray", ray_gpus=1, ray_address="", batched="none"))
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    try:
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, ray_address=cluster.address))
        with opened(config, tmp_path, 4, print) as grid:
            hello = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            assert not any(r is None or r.has_error() for r in replies(grid, list(grid.push_messages(hello)), float("inf")))
            assert grid.workers == 1 and ray.available_resources().get("GPU", 0) == 0  # two CPUs, one GPU: one worker, which holds it
        more = dataclasses.replace(config, engine=dataclasses.replace(config.engine, ray_gpus=2))
        with pytest.raises(ConfigError, match="engine.ray_gpus=2 for a worker: it has 2 CPUs and 1 GPUs"), opened(more, tmp_path, 4, print):
            pass
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_missing_cluster_gives_a_one_sentence_error(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra: pip install 'fedtune[ray]'")
    from fedtune.errors import ConfigError

    with pytest.raises(ConfigError, match=r"engine.ray_address=127.0.0.1:1: Ray cannot be reached"):
        simulate(tiny_config(tmp_path, engine=EngineConfig(kind="ray", ray_address="127.0.0.1:1")))


def rounds_of(folder: Path) -> list[int]:
    return [json.loads(line)["round"] for file in folder.rglob("metrics.jsonl") for line in file.read_text().splitlines()]


def fedsa(config: Config) -> Config:
    return dataclasses.replace(config, strategy={"_target_": "fedtune.strategies.fedsa.FedSA"})


def with_privacy(config: Config) -> Config:
    return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, kind="record", epsilon=None, noise=1.0, clip=1.0))

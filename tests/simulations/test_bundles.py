"""Bundled messages: the bridge and the clients see what they would see without them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.app import simulate
from fedtune.clients.workspace import workspace
from fedtune.config import Config, EngineConfig, EvalConfig, to_dict
from fedtune.simulations import bundles
from fedtune.simulations.bundles import BundlingGrid, unbundling
from fedtune.simulations.grid import InProcessGrid
from fedtune.simulations.together import Together
from fedtune.state import AdapterSpec, AdapterState
from tests.fakes import fake_client_app
from tests.tiny import tiny_config


class Counting(InProcessGrid):
    """Counts what it is given."""

    def push_messages(self, messages: Any) -> Any:
        kept = list(messages)
        self.pushed = getattr(self, "pushed", []) + [m.metadata.message_type for m in kept]
        return super().push_messages(kept)


def bundled(config: Config, monkeypatch: pytest.MonkeyPatch, workers: int) -> list[Counting]:
    """Make the in-process engine send bundles, as the Ray engine does."""
    space, grids = workspace(json.dumps(to_dict(config))), []

    def grid(app: Any, nodes: int, together: Any) -> BundlingGrid:
        grids.append(Counting(unbundling(app, lambda: Together(space, config.engine.batched)), nodes))
        return BundlingGrid(grids[-1], lambda: workers)

    monkeypatch.setattr("fedtune.simulations.grid.InProcessGrid", grid)
    return grids


def test_a_bundled_run_ends_with_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, eval=EvalConfig(where="none", clients=-1), engine=EngineConfig(threads=1, batched="3"))
    plain = simulate(dataclasses.replace(config, engine=EngineConfig(threads=1, batched="none")))
    grids = bundled(config, monkeypatch, 2)
    ours = simulate(config)
    a, b = (AdapterState.load(p / "adapter" / "fedtune.safetensors") for p in (plain, ours))
    assert max(float((a[n] - b[n]).abs().max()) for n in a.tensors) < 1e-5
    # four hellos, then two bundles for the four clients of each of two rounds and of three evaluations
    assert [grids[0].pushed.count(k) for k in ("query", "train", "evaluate")] == [4, 4, 6]
    lines = [[json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (plain, ours)]
    assert [(x["round"], x["client"]) for x in lines[0]] == [(x["round"], x["client"]) for x in lines[1]]
    for x, y in zip(*lines, strict=True):
        assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-5) and x.get("bytes_down") == y.get("bytes_down")


def test_shares_are_alike_and_not_too_large() -> None:
    sizes = [[len(s) for s in bundles._shares(list(range(n)), w)] for n, w in ((4, 2), (5, 2), (1, 3), (100, 2))]  # type: ignore[arg-type]
    assert sizes == [[2, 2], [2, 3], [1], [25, 25, 25, 25]]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_round_without_messages_sends_no_bundle(workers: int) -> None:
    grid = Counting(fake_client_app({}), 1)
    assert not list(BundlingGrid(grid, lambda: workers).push_messages([])) and not list(bundles._shares([], workers))


def test_a_record_that_many_get_is_packed_once() -> None:
    shared = AdapterState({"w": torch.zeros(3)}, AdapterSpec(method="lora")).to_arrays()
    contents = [RecordDict({"adapter": shared, "plan": ConfigRecord({"k": k})}) for k in range(3)]
    packed = bundles._pack("clients", [{"node": k} for k in range(3)], contents)
    assert len(packed.array_records) == 1
    for k, (header, content) in enumerate(bundles._unpack("clients", packed)):
        assert header["node"] == k and content["adapter"] is shared and content.config_records["plan"]["k"] == k


def test_a_lost_bundle_is_an_error_of_each_of_its_clients() -> None:
    def broken() -> Any:
        raise MemoryError("the worker died")

    grid = BundlingGrid(InProcessGrid(unbundling(fake_client_app({"a": 1, "b": 2}), broken), 2), lambda: 1)
    hello = [Message(RecordDict(), n, "query") for n in grid.get_node_ids()]
    assert len(list(grid.pull_messages(grid.push_messages(hello)))) == 2
    ids = list(grid.push_messages([Message(RecordDict(), n, "train") for n in grid.get_node_ids()]))
    for i in ids:
        (reply,) = grid.pull_messages([i])
        assert reply.has_error() and "worker died" in str(reply.error.reason) and reply.metadata.reply_to_message_id == i

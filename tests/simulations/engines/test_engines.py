"""The in-process grid and Ray: the same ServerApp and ClientApp, the same result."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import EngineConfig, EvalConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.experiment import simulate
from fedtune.simulations.engines.grid import InProcessGrid
from tests.tiny import tiny_config


def test_clients_cannot_change_the_servers_tensors() -> None:
    app = ClientApp()

    @app.train()
    def pop(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["a"]
        arrays.pop("w")
        message.content.pop("c")
        return Message(RecordDict({"left": ConfigRecord({"n": len(arrays)})}), reply_to=message)

    grid = InProcessGrid(app, 2)
    content = RecordDict({"a": ArrayRecord({"w": _array(), "v": _array()}), "c": ConfigRecord({"x": 1})})
    replies = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    assert [r.content.config_records["left"]["n"] for r in replies] == [1, 1]
    assert set(content) == {"a", "c"} and set(content.array_records["a"]) == {"w", "v"}


def _array() -> object:
    from flwr.app import Array

    return Array(torch.zeros(2))


def test_a_client_app_that_raises_is_an_error_reply() -> None:
    app = ClientApp()

    @app.train()
    def broken(message: Message, context: Context) -> Message:
        raise KeyError("lost")

    grid = InProcessGrid(app, 1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), 1, "train")])
    assert reply.has_error() and "KeyError" in str(reply.error.reason)


def test_the_same_config_gives_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    first, second = (simulate(config) / "adapter" / "fedtune.safetensors" for _ in range(2))
    assert first != second and first.read_bytes() == second.read_bytes()
    other = simulate(dataclasses.replace(config, seed=1)) / "adapter" / "fedtune.safetensors"
    assert other.read_bytes() != first.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("batched", ["none", "3"])
def test_ray_agrees_with_in_process(tmp_path: Path, capsys: pytest.CaptureFixture[str], batched: str) -> None:
    pytest.importorskip("ray", reason="needs the extra: pip install 'fedtune[ray]'")
    config = tiny_config(tmp_path, rounds=2, eval=EvalConfig(where="server", clients=-1))
    ours = simulate(config)
    ray = simulate(dataclasses.replace(config, engine=EngineConfig(kind="ray", ray_cpus=1, batched=batched)))
    a, b = (AdapterState.load(p / "adapter" / "fedtune.safetensors") for p in (ours, ray))
    assert max(float((a[n] - b[n]).abs().max()) for n in a.tensors) < 1e-5
    lines = [[json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (ours, ray)]
    assert [(x["round"], x["client"]) for x in lines[0]] == [(x["round"], x["client"]) for x in lines[1]]
    for x, y in zip(*lines, strict=True):  # the seconds in the JSON may differ in their digits
        assert x.get("bytes_up", 0) == pytest.approx(y.get("bytes_up", 0), abs=64)

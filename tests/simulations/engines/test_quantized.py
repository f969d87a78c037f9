"""Batched clients over quantized frozen layers: one dequantization for all, with each client's own update."""

from pathlib import Path

import pytest
import torch

from fedtune.clients.trainer import train
from fedtune.config import PeftConfig
from fedtune.models import LiveAdapter, load_backbone
from fedtune.simulations.engines import stacked
from fedtune.simulations.engines.batched import way_of
from tests.models.build import checkpoint, hub, llama_config
from tests.simulations.engines.test_vmapped import LM, rows
from tests.simulations.engines.turns import check, turn_inputs_of
from tests.working import work

quantize = pytest.importorskip("fedtune.models.quantize", exc_type=ImportError)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def quantized_adapter(folder: Path, precision: str, method: str = "lora") -> LiveAdapter:
    if why := quantize._why_not(precision, torch.float32, torch.device("cpu")):
        pytest.skip(f"bitsandbytes has no {precision} kernel here: {why}")
    path = checkpoint(folder / "model", config=llama_config(hidden_size=64, intermediate_size=128, head_dim=32))
    backbone = load_backbone(hub(path, precision=precision, compute="fp32"), LM)
    return LiveAdapter(backbone, PeftConfig(method=method, rank=3), LM)


@pytest.mark.parametrize("precision", quantize.KINDS)
def test_each_update_is_the_sequential_one(tmp_path: Path, precision: str) -> None:
    live = quantized_adapter(tmp_path, precision)
    assert way_of(live, LM)[0] is stacked.installed
    todo = turn_inputs_of(rows(LM), live.read(version=0))
    live.load(todo[0].start)
    train(work(live, todo[0].examples, todo[0].plan, LM, 1))
    check(live, todo, LM, 1)


@pytest.mark.parametrize("precision", quantize.KINDS)
def test_vmap_is_refused_with_a_reason(tmp_path: Path, precision: str) -> None:
    way, why = way_of(quantized_adapter(tmp_path, precision, "dora"), LM)
    assert way is None and "quantized layers" in why

"""The estimate against what a forward pass keeps, on tiny models of many architectures, and the probe itself."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fedtune.clients.devices import probe
from fedtune.clients.devices.estimate import kept_bytes, shapes_of, weights_bytes
from fedtune.config import Config, ModelConfig, PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, load_backbone
from tests.models.build import CONFIGS, ENCODERS, checkpoint, hub, llama_config

WITHIN = 2.0
LM, CLASSES = TaskConfig(kind="causal_lm", max_length=32), TaskConfig(kind="classification", max_length=32)
WIDE = llama_config(hidden_size=64, intermediate_size=192, head_dim=16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check(model: ModelConfig, task: TaskConfig, peft: PeftConfig) -> None:
    labels = 3 if task.kind == "classification" else 0
    shapes = shapes_of(Config(model=model, task=task, peft=peft), labels)
    live = LiveAdapter(load_backbone(model, task, num_labels=labels), peft, task)
    weights = probe.stored_bytes(live.model, live.parameters.values())
    assert weights == pytest.approx(weights_bytes(shapes, model.precision), rel=0.1)
    assert shapes.entries == sum(p.numel() for p in live.parameters.values())
    for rows, width, counted in ((1, 20, 5), (6, 13, 12)):
        measured = probe.kept_bytes(live, task, live.parameters, rows, width, counted)
        assert 1 / WITHIN < measured / kept_bytes(shapes, model.precision, rows, width, counted) < WITHIN


@pytest.mark.parametrize("kind", [k for k in CONFIGS if k not in ("albert", "t5")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_within_a_factor_of_two(tmp_path: Path, kind: str, precision: str) -> None:
    model = hub(checkpoint(tmp_path / "model", kind), precision=precision)
    check(model, CLASSES if kind in ENCODERS else LM, PeftConfig(rank=3))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_of_quantised_backbones_too(tmp_path: Path, precision: str, compute: str) -> None:
    model = hub(checkpoint(tmp_path / "model", config=WIDE), precision=precision, compute=compute)
    try:
        check(model, LM, PeftConfig(rank=3))
    except ModelError as bad:
        pytest.skip(str(bad))


@pytest.mark.parametrize("method", ["prompt", "ia3", "bitfit", "adapter"])
def test_of_other_methods_the_right_order(tmp_path: Path, method: str) -> None:
    model = hub(checkpoint(tmp_path / "model", "bert" if method == "bitfit" else "llama"))
    task, labels = (CLASSES, 3) if method == "bitfit" else (LM, 0)
    peft = PeftConfig(method=method, tokens=2, bottleneck=4)
    shapes = shapes_of(Config(model=model, task=task, peft=peft), labels)
    live = LiveAdapter(load_backbone(model, task, num_labels=labels), peft, task)
    measured = probe.kept_bytes(live, task, live.parameters, 4, 16, 8)
    assert 1 / 3 < measured / kept_bytes(shapes, "fp32", 4, 16, 8) < 3


def test_nothing_of_model_or_generators_is_changed(tmp_path: Path) -> None:
    peft = PeftConfig(rank=3, dropout=0.5)
    live = LiveAdapter(load_backbone(hub(checkpoint(tmp_path / "model")), LM), peft, LM)
    live.model.eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    weights = {n: p.clone() for n, p in live.model.named_parameters()}
    first = probe.kept_bytes(live, LM, live.parameters, 2, 8, 7)
    assert torch.equal(before, torch.get_rng_state()) and not live.model.training and not live.backbone.model.training
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in live.model.named_parameters())
    assert all(p.requires_grad for p in live.parameters.values())
    assert first == probe.kept_bytes(live, LM, live.parameters, 2, 8, 7)


def test_more_rows_keep_in_proportion_and_fewer_trained_tensors_less(tmp_path: Path) -> None:
    live = LiveAdapter(load_backbone(hub(checkpoint(tmp_path / "model")), LM), PeftConfig(rank=3), LM)
    one, four = (probe.kept_bytes(live, LM, live.parameters, rows, 16, 15) for rows in (1, 4))
    assert 3.3 * one < four < 4 * one
    last = [n for n in live.parameters if ".layers.1." in n]
    assert last and probe.kept_bytes(live, LM, last, 4, 16, 15) < 0.8 * four


def test_layers_of_odd_rows_stay_whole_in_the_estimate_as_they_do_in_the_model(tmp_path: Path) -> None:
    odd = llama_config(hidden_size=64, intermediate_size=40, head_dim=16)
    shapes = shapes_of(Config(model=hub(checkpoint(tmp_path / "model", config=odd)), task=LM))
    assert shapes.whole == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    none = dataclasses.replace(shapes, whole=frozenset())
    # 64·40 entries in bf16 or float32, and not in four bits
    packed = 64 * 40 // 2 + 40 + 4 + 4 * 272
    assert weights_bytes(shapes, "nf4") - weights_bytes(none, "nf4") == 2 * (64 * 40 * shapes.width_of("nf4") - packed)

"""Every PEFT method on every shape of head: vmap over clients equals sequential training."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config import PeftConfig, TaskConfig
from fedtune.data import Example, pad_id
from fedtune.models import LiveAdapter, initial_adapter, load_backbone
from fedtune.models.backbone import quiet
from fedtune.simulations.engines import stacked, vmapped
from fedtune.simulations.engines.batched import way_of
from tests.models.build import VOCABULARY, checkpoint, hub
from tests.quick import quick
from tests.simulations.engines.turns import check, turn_inputs_of

LM = TaskConfig(kind="causal_lm", max_length=12)
ANSWERS = TaskConfig(kind="instruction", max_length=12, max_new_tokens=4)
CLASSES = TaskConfig(kind="classification", max_length=12)
SIZES = {"c0": 13, "c1": 9, "c2": 5, "c3": 2}
METHODS = ["dora", "ia3", "prompt", "prefix", "adapter", "ptuning_v2", "full", "ravan", "fedsb"]


def build_adapter(folder: Path, kind: str, peft: PeftConfig, task: TaskConfig, **model: Any) -> tuple[LiveAdapter, Any]:
    with quiet():
        config, labels = hub(checkpoint(folder, kind), **model), 3 if task.kind == "classification" else 0
        live = LiveAdapter(load_backbone(config, task, num_labels=labels), peft, task)
    return live, initial_adapter(config, task, peft, num_labels=labels, seed=0).replace(base=live.backbone.fingerprint)


def rows(task: TaskConfig, seq2seq: bool = False) -> dict[str, list[Example]]:
    """Each client's random examples of 3 to 11 tokens."""
    rng, out = np.random.default_rng(0), {}
    for client, size in SIZES.items():
        examples = []
        for _ in range(size):
            ids = rng.integers(3, VOCABULARY, rng.integers(3, 12)).astype(np.int32)
            labels = rng.integers(0, 3, 1).astype(np.int32) if task.kind == "classification" else ids
            if seq2seq and task.kind == "instruction":
                labels = np.array([-100, *rng.integers(3, VOCABULARY, rng.integers(1, 6))], np.int32)
            elif seq2seq:
                ids[-1] = 1  # one end token, at the end, where T5 classifies
            examples.append(Example(ids, labels))
        out[client] = examples
    return out


def agree(folder: Path, kind: str, peft: PeftConfig, task: TaskConfig, way: Any = vmapped.installed, **changes: Any) -> None:
    live, initial = build_adapter(folder, kind, peft, task)
    assert way_of(live, task)[0] is way, way_of(live, task)[1]
    check(live, turn_inputs_of(rows(task, live.backbone.seq2seq), initial, **changes), task, pad_id(live.backbone.tokenizer), way)


@pytest.mark.parametrize("method", quick(METHODS, "dora", "prefix", "ravan"))
def test_each_method_on_a_decoder(tmp_path: Path, method: str) -> None:
    agree(tmp_path, "llama", PeftConfig(method=method, rank=3, core=3, tokens=3, bottleneck=5), LM)


@pytest.mark.parametrize(
    "method", quick(["dora", "ia3", "prompt", "adapter", "ptuning_v2", "bitfit", "full", "ravan", "fedsb"], "prompt", "bitfit")
)
def test_each_method_with_a_head_of_two_layers(tmp_path: Path, method: str) -> None:
    # a key's bias has only rounding errors as gradient, which AdamW would amplify to full steps
    changes = {"optimizer": "sgd", "lr": 0.05} if method in ("bitfit", "full") else {}
    agree(tmp_path, "roberta", PeftConfig(method=method, rank=3, core=3, tokens=3, bottleneck=5), CLASSES, **changes)


@pytest.mark.parametrize("kind", quick(["qwen3", "gpt2", "opt", "bert", "distilbert", "albert"], "gpt2", "albert"))
def test_each_architecture(tmp_path: Path, kind: str) -> None:
    task = CLASSES if kind in ("bert", "distilbert", "albert") else LM
    agree(tmp_path, kind, PeftConfig(method="adapter", bottleneck=5), task)


@pytest.mark.parametrize("method", quick(["lora", "adapter", "ptuning_v2"], "adapter"))
def test_an_encoder_decoder(tmp_path: Path, method: str) -> None:
    way = stacked.installed if method == "lora" else vmapped.installed
    agree(tmp_path, "t5", PeftConfig(method=method, rank=3, core=3, tokens=3, bottleneck=5), ANSWERS, way)


def test_an_encoder_decoders_classes_are_stacked_or_not_at_all(tmp_path: Path) -> None:
    agree(tmp_path / "a", "t5", PeftConfig(rank=3), CLASSES, stacked.installed)
    live, _ = build_adapter(tmp_path / "b", "t5", PeftConfig(method="adapter", bottleneck=5), CLASSES)
    way, why = way_of(live, CLASSES)
    assert way is None and "unique_consecutive" in why  # transformers counts each row's end tokens


@pytest.mark.parametrize("kind", quick(["bert", "roberta", "distilbert", "albert", "llama", "gpt2", "opt"], "roberta", "gpt2"))
@pytest.mark.parametrize("method", quick(["lora", "rslora"], "lora"))
def test_heads_of_any_depth_are_stacked_by_hand(tmp_path: Path, kind: str, method: str) -> None:
    agree(tmp_path, kind, PeftConfig(method=method, rank=3), CLASSES, stacked.installed)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"clip_norm": 0.05},
        {"turn": "fedprox", "params": {"mu": 0.5}},
        {"optimizer": "sgd", "lr": 0.1},
        {"measure": ("start_loss",)},
        {"train": ("*.lora_B", "*.lora_magnitude")},
    ],
    ids=["accumulated", "clipped", "proximal", "sgd", "measured", "partly trained"],
)
def test_each_kind_of_turn(tmp_path: Path, changes: dict[str, Any]) -> None:
    agree(tmp_path, "llama", PeftConfig(method="dora", rank=3), LM, **changes)


@pytest.mark.slow
def test_the_adapters_dropout_is_each_clients_own(tmp_path: Path) -> None:
    agree(tmp_path, "llama", PeftConfig(method="dora", rank=3, dropout=0.3), LM)


def test_ranks_may_differ(tmp_path: Path) -> None:
    live, wide = build_adapter(tmp_path / "a", "llama", PeftConfig(method="dora", rank=3), LM)
    _, narrow = build_adapter(tmp_path / "b", "llama", PeftConfig(method="dora", rank=2), LM)
    narrow = narrow.replace(base=wide.spec.base)
    todo = [turn_inputs_of(rows(LM), start)[k] for k, start in enumerate((wide, narrow, narrow, wide))]
    check(live, todo, LM, pad_id(live.backbone.tokenizer), vmapped.installed)


def test_models_that_vmap_would_compute_wrong_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, _ = build_adapter(tmp_path, "llama", PeftConfig(method="dora", rank=3), LM)
    right = vmapped.counted_logits
    monkeypatch.setattr(vmapped, "counted_logits", lambda *args: (right(*args)[0] * 1.01, None))
    assert vmapped.why_not(live, LM) == "torch.func.vmap changes its results"


def test_models_that_vmap_cannot_run_are_refused_with_a_reason(tmp_path: Path) -> None:
    live, _ = build_adapter(tmp_path, "llama", PeftConfig(method="dora", rank=3), LM)
    layer = live.backbone.model.get_submodule("model.norm")
    layer.register_forward_hook(lambda module, args, y: y if float(y.sum()) else None)  # a hook that reads a value
    way, why = way_of(live, LM)
    assert way is None and "vmap fails on the model (RuntimeError" in why


def test_a_backbone_with_dropout_of_its_own_is_not_mapped(tmp_path: Path) -> None:
    live, _ = build_adapter(tmp_path, "llama", PeftConfig(method="dora", rank=3), LM)
    live.backbone.model.config.attention_dropout = 0.1
    way, why = way_of(live, LM)
    assert way is None and "attention_dropout" in why


def test_bf16_is_batched_the_same(tmp_path: Path) -> None:
    live, initial = build_adapter(tmp_path, "llama", PeftConfig(method="dora", rank=3), LM, precision="bf16")
    assert way_of(live, LM)[0] is vmapped.installed
    todo = turn_inputs_of(rows(LM), initial, optimizer="sgd", lr=0.05)
    todo = [dataclasses.replace(j, plan=dataclasses.replace(j.plan, steps=k + 1)) for k, j in enumerate(todo)]
    check(live, todo, LM, pad_id(live.backbone.tokenizer), vmapped.installed, within=0.05)


def test_the_model_is_unchanged_afterward(tmp_path: Path) -> None:
    live, initial = build_adapter(tmp_path, "llama", PeftConfig(method="dora", rank=3, dropout=0.2), LM)
    live.load(initial)
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        live.model.eval()
        before = live.model(input_ids=ids).logits
    check(live, turn_inputs_of(rows(LM), initial), LM, pad_id(live.backbone.tokenizer), vmapped.installed)
    live.load(initial)
    live.model.eval()
    with torch.no_grad():
        assert torch.equal(live.model(input_ids=ids).logits, before)

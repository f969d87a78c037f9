"""The estimate compared with the memory that a forward pass keeps, on tiny models of many architectures, and the probe."""

import dataclasses
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from fedtune.clients.devices import probe
from fedtune.clients.devices.estimate import flops, kept_bytes, shapes_of, weights_bytes
from fedtune.config import Config, ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts.task import IGNORED
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, lean, load_backbone
from tests.models.build import CONFIGS, ENCODERS, checkpoint, hub, llama_config

WITHIN = 2.0
LM, CLASSES = TaskConfig(kind="causal_lm", max_length=32), TaskConfig(kind="classification", max_length=32)
WIDE = llama_config(hidden_size=64, intermediate_size=192, head_dim=16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check(model: ModelConfig, task: TaskConfig, peft: PeftConfig) -> None:
    labels = 3 if task.kind == "classification" else 0
    config = Config(model=model, task=task, peft=peft)
    config.client.lean = "none"  # the probe below uses PEFT's modules
    shapes = shapes_of(config, labels)
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
def test_the_estimate_of_quantized_backbones_is_within_a_factor_of_two(tmp_path: Path, precision: str, compute: str) -> None:
    model = hub(checkpoint(tmp_path / "model", config=WIDE), precision=precision, compute=compute)
    try:
        check(model, LM, PeftConfig(rank=3))
    except ModelError as bad:
        pytest.skip(str(bad))


@pytest.mark.parametrize(("method", "core"), [("ravan", 4), ("fedsb", 7)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_includes_frozen_bases(tmp_path: Path, method: str, core: int, precision: str) -> None:
    model = hub(checkpoint(tmp_path / "model"), precision=precision)
    peft = PeftConfig(method=method, heads=3, core=core)
    check(model, LM, peft)
    shapes = shapes_of(Config(model=model, task=LM, peft=peft))
    rows = {"ravan": 3 * core, "fedsb": core}[method]  # of A and of Bᵀ
    assert shapes.bases == sum(rows * (out + into) for out, into in shapes.linear.values()) and shapes.widths == rows * len(shapes.linear)
    bare = dataclasses.replace(shapes, bases=0, widths=0)
    assert weights_bytes(shapes, precision) - weights_bytes(bare, precision) == shapes.bases * {"fp32": 4, "bf16": 2}[precision]
    assert flops(shapes, 7.0) - flops(bare, 7.0) == 4 * shapes.bases * 7
    assert (
        kept_bytes(shapes, precision, 2, 9, 5) - kept_bytes(bare, precision, 2, 9, 5)
        == 18 * shapes.widths * {"fp32": 4, "bf16": 2}[precision]
    )


@pytest.mark.parametrize("method", ["prompt", "ia3", "bitfit", "adapter"])
def test_estimates_order_the_other_methods_correctly(tmp_path: Path, method: str) -> None:
    model = hub(checkpoint(tmp_path / "model", "bert" if method == "bitfit" else "llama"))
    task, labels = (CLASSES, 3) if method == "bitfit" else (LM, 0)
    peft = PeftConfig(method=method, tokens=2, bottleneck=4)
    shapes = shapes_of(Config(model=model, task=task, peft=peft), labels)
    live = LiveAdapter(load_backbone(model, task, num_labels=labels), peft, task)
    measured = probe.kept_bytes(live, task, live.parameters, 4, 16, 8)
    assert 1 / 3 < measured / kept_bytes(shapes, "fp32", 4, 16, 8) < 3


def test_the_probe_changes_neither_model_nor_generators(tmp_path: Path) -> None:
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


def test_kept_memory_grows_with_rows_and_trained_tensors(tmp_path: Path) -> None:
    live = LiveAdapter(load_backbone(hub(checkpoint(tmp_path / "model")), LM), PeftConfig(rank=3), LM)
    one, four = (probe.kept_bytes(live, LM, live.parameters, rows, 16, 15) for rows in (1, 4))
    assert 3.3 * one < four < 4 * one
    last = [n for n in live.parameters if ".layers.1." in n]
    assert last and probe.kept_bytes(live, LM, last, 4, 16, 15) < 0.8 * four


def test_a_lean_step_saves_less_and_its_block_counts_once(tmp_path: Path) -> None:
    live = LiveAdapter(load_backbone(hub(checkpoint(tmp_path / "model", config=WIDE)), LM), PeftConfig(rank=3), LM)
    by_peft = probe.kept_bytes(live, LM, live.parameters, 6, 20, 5)
    assert lean.enable(live) == ""
    sizes = []
    for kept in (None, 1, 0):
        with lean.keeping(live.model, kept):
            sizes.append(probe.kept_bytes(live, LM, live.parameters, 6, 20, 5))
    shapes = shapes_of(Config(model=hub(tmp_path / "model"), task=LM, peft=PeftConfig(rank=3)))
    assert sizes[2] < sizes[1] < sizes[0] < 0.7 * by_peft and "fp32" in shapes.lean
    layer = 6 * 20 * 4 * (64 + 2 * shapes.query + 2 * shapes.keys + 2 * 192)  # bytes of what a layer keeps, as the estimate counts them
    assert sizes[0] - sizes[1] == pytest.approx(layer, rel=0.1)


def test_layers_of_unsupported_row_length_are_not_quantized_in_estimate_and_model(tmp_path: Path) -> None:
    odd = llama_config(hidden_size=64, intermediate_size=40, head_dim=16)
    shapes = shapes_of(Config(model=hub(checkpoint(tmp_path / "model", config=odd)), task=LM))
    assert shapes.whole == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    none = dataclasses.replace(shapes, whole=frozenset())
    # 64·40 entries in bf16 or float32, and not in four bits
    packed = 64 * 40 // 2 + 40 + 4 + 4 * 272
    assert weights_bytes(shapes, "nf4") - weights_bytes(none, "nf4") == 2 * (64 * 40 * shapes.width_of("nf4") - packed)


def test_bytes_of_a_model_by_hand() -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    two.weight = one.weight
    model = nn.Sequential(one, two)
    assert probe.stored_bytes(model, []) == 4 * (2 * 3 + 2)  # a tied weight counts once
    assert probe.stored_bytes(model, [cast(nn.Parameter, one.bias)]) == 4 * 2 * 3


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("llama", [[IGNORED, IGNORED, 3, 3, 3]] * 2), ("t5", [[3, 3, 3, 3]] * 2), ("bert", [0, 0])],  # T5's targets are separate rows
)
def test_a_micro_batch_of_five_tokens_with_three_counted(tmp_path: Path, kind: str, labels: list[list[int]] | list[int]) -> None:
    task = CLASSES if kind == "bert" else TaskConfig(kind="instruction", max_length=32, generate=False)
    live = LiveAdapter(load_backbone(hub(checkpoint(tmp_path / "model", kind)), task, num_labels=3), PeftConfig(rank=3), task)
    batch = probe._batch(live, task, 2, 5, 3, torch.device("cpu"))
    assert batch["labels"].tolist() == labels and batch["input_ids"].tolist() == [[3] * 5] * 2 == (3 * batch["attention_mask"]).tolist()
    assert probe.kept_bytes(live, task, live.parameters, 2, 5, 3) > 0


def test_the_shapes_of_a_tiny_llama_by_hand(tmp_path: Path) -> None:
    model = hub(checkpoint(tmp_path / "model"))
    peft = PeftConfig(rank=3, targets=["q_proj", "down_proj"])
    shapes = shapes_of(Config(model=model, task=LM, peft=peft))
    # h 16, feed-forward 24, 4 heads of 4 that share 2 keys, 2 layers, 32 words
    assert {n.removeprefix("model.layers.1."): s for n, s in shapes.linear.items() if ".1." in n} == {
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
    }
    assert (shapes.layers, shapes.hidden, shapes.inner, shapes.attention_heads, shapes.query, shapes.logits) == (2, 16, 24, 4, 16, 32)
    assert (shapes.gated, shapes.classifies, shapes.heads, shapes.rest) == (True, False, 0, 32 * 16 + 5 * 16)  # embeddings and norms
    # factors of q (16 + 16 a rank) and of down (24 + 16) in two layers
    assert (shapes.rank, shapes.modules, shapes.inputs, shapes.per_rank, shapes.entries) == (3, 4, 2 * (16 + 24), 2 * (32 + 40), 3 * 144)


def test_methods_without_factors_have_no_rank_and_some_read_every_layer(tmp_path: Path) -> None:
    model = hub(checkpoint(tmp_path / "model"))
    result = {m: shapes_of(Config(model=model, task=LM, peft=PeftConfig(method=m))) for m in ("full", "ia3", "prompt")}
    every = 2 * (6 * 16 + 24)  # the inputs of seven layers, twice
    assert all((s.rank, s.per_rank) == (0, 0) for s in result.values())
    assert {m: s.inputs for m, s in result.items()} == {"full": every, "ia3": every, "prompt": 0}


def test_the_layers_of_a_seq2seq_model_include_encoder_and_decoder(tmp_path: Path) -> None:
    task = TaskConfig(kind="instruction", max_length=32, generate=False)
    shapes = shapes_of(Config(model=hub(checkpoint(tmp_path / "model", "t5")), task=task))
    assert (shapes.layers, shapes.query, shapes.inner) == (2 + 2, 2 * 6, 24)

"""Products with quantized weights: shifts, memory, gradients and merges."""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedtune.config import PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, load_backbone, loss_sum
from fedtune.models.shift import FrozenWeights
from fedtune.simulations.benchmarks.precision import in_process
from tests.models.build import hub, token_ids
from tests.models.test_quantize import (  # noqa: F401  cache: a fixture
    KINDS,
    LM,
    cache,
    dequantized_backbone,
    gradients,
    logits,
    quantized_backbone,
    random_state,
    relative_error,
    wide,
    worst,
)  # fmt: skip
from tests.quick import quick


def rows_of_text() -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def shift(live: LiveAdapter, version: int, size: float) -> AdapterState:
    drawn = torch.Generator().manual_seed(version)
    ranks = live.spec.ranks
    tensors = {n: size * torch.randn(t.shape, generator=drawn) for n, t in live.read(version=0).tensors.items()}
    return AdapterState(tensors, AdapterSpec(method="lora", version=version, ranks=dict(ranks), scaling=dict.fromkeys(ranks, 0.5)))


@pytest.mark.parametrize("precision", quick(KINDS, "nf4"))
@pytest.mark.parametrize("kind", quick(["llama", "gpt2"], "gpt2"))
@pytest.mark.parametrize("rank", [2, 40])  # 40: two shifts' factors are larger than the matrices
def test_shifts_are_side_branches_of_quantized_layers(tmp_path: Path, precision: str, kind: str, rank: int) -> None:
    folder = wide(tmp_path / kind, kind)
    backbone = quantized_backbone(folder, precision)
    plain = dequantized_backbone(backbone, folder)
    bare = logits(backbone)
    one, two = LiveAdapter(backbone, PeftConfig(rank=rank), LM), LiveAdapter(plain, PeftConfig(rank=rank), LM)
    mine, theirs = FrozenWeights(backbone.model), FrozenWeights(plain.model)
    for version in (1, 2):
        for frozen in (mine, theirs):
            frozen.add(shift(one, version, 0.3))
    state = random_state(one)
    one.load(state)
    two.load(state)
    assert relative_error(logits(backbone), bare) > 0.1
    assert relative_error(logits(backbone), logits(plain)) < 1e-4
    assert worst(gradients(one), gradients(two)) < 1e-4
    mine.reset(quantized_backbone(folder, precision).model)
    with one.disabled():
        assert torch.equal(logits(backbone), bare) and mine.versions == ()


def test_no_shift_is_too_small_for_four_bits(tmp_path: Path) -> None:
    folder = wide(tmp_path / "llama")
    backbone = quantized_backbone(folder, compute="bf16")
    live, frozen = LiveAdapter(backbone, PeftConfig(rank=2), LM), FrozenWeights(backbone.model)
    layer = live.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    zero = torch.zeros(5, 128, dtype=torch.bfloat16)
    step = shift(live, 1, 0.01)
    module = "model.layers.0.self_attn.q_proj"
    for version in range(1, 11):
        frozen.add(step.replace(version=version))
    want = 10 * 0.5 * (step[f"{module}.lora_B"] @ step[f"{module}.lora_A"])  # about 5e-4, while NF4's levels are 0.1 apart
    branch = frozen._branches[module]
    assert relative_error(branch(layer, (x,), zero).float(), x.float() @ want.T) < 0.01


def narrow(folder: Path, precision: str) -> LiveAdapter:
    live = LiveAdapter(quantized_backbone(folder, precision, compute="bf16"), PeftConfig(rank=3), LM)
    live.load(random_state(live))
    live.model.train()
    return live


NARROW = ["bf16", *KINDS]


@pytest.mark.parametrize("precision", NARROW)
def test_a_step_keeps_no_float32_copy_of_a_layers_input(tmp_path: Path, precision: str) -> None:
    live = narrow(wide(tmp_path / "llama"), precision)
    kept: dict[torch.dtype, set[int]] = {}
    rows: list[Tensor] = []  # keeps the tensors alive, so that no address is reused

    def pack(t: Tensor) -> Tensor:
        rows.append(t)
        if t.shape == (30, 64):  # 3 × 10 tokens
            kept.setdefault(t.dtype, set()).add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = loss_sum(live.model, rows_of_text(), LM)
    loss.backward()
    # 2 layers: q, k and v read one tensor, gate and up another
    assert {dtype: len(at) for dtype, at in kept.items()} == {torch.bfloat16: 4}
    assert all(p.dtype == torch.float32 and cast(Tensor, p.grad).dtype == torch.float32 for p in live.parameters.values())


@pytest.mark.parametrize("precision", NARROW)
def test_a_narrow_product_has_the_gradient_of_the_float64_one(tmp_path: Path, precision: str) -> None:
    live = narrow(wide(tmp_path / "llama"), precision)
    name = "model.layers.0.mlp.up_proj"
    layer, (a, b) = cast(Any, live.model).base_model.model.get_submodule(name), (live.parameters[f"{name}.lora_{f}"] for f in "AB")
    drawn = torch.Generator().manual_seed(5)
    x, g = (torch.randn(30, n, generator=drawn).to(torch.bfloat16) for n in (64, 128))
    layer(x).backward(g)
    s = live.spec.scaling[name]
    wide_x, wide_g, wide_a, wide_b = (t.detach().double() for t in (x, g, a, b))
    # rounding to bf16 changes a number by at most 0.2 % on average; there are four roundings
    assert relative_error(cast(Tensor, b.grad).double(), s * wide_g.T @ (wide_x @ wide_a.T)) < 0.01
    assert relative_error(cast(Tensor, a.grad).double(), s * (wide_g @ wide_b).T @ wide_x) < 0.01


def test_a_float32_backbone_multiplies_as_peft_does(tmp_path: Path) -> None:
    live = LiveAdapter(load_backbone(hub(wide(tmp_path / "llama")), LM), PeftConfig(rank=2), LM)
    assert not any("forward" in m.__dict__ for m in live.model.modules())


def test_narrow_logits_are_counted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.models import losses

    live = LiveAdapter(load_backbone(hub(wide(tmp_path / "llama"), precision="bf16"), LM), PeftConfig(rank=2), LM)
    live.load(random_state(live))

    def loss_and_gradient() -> tuple[float, Tensor]:
        loss, count = loss_sum(live.model, rows_of_text(), LM)
        assert count == 27  # 3 rows of 10 tokens; no token predicts the first
        grads = torch.autograd.grad(loss, list(live.parameters.values()))
        return loss.item(), torch.cat([g.flatten() for g in grads])

    whole, expected = loss_and_gradient()
    monkeypatch.setattr(losses, "_PIECE", 4 * live.backbone.model.config.vocab_size)  # 7 pieces, the last of 3 rows
    pieces, actual = loss_and_gradient()
    assert pieces == pytest.approx(whole, rel=1e-6) and torch.equal(actual, expected)


def test_a_shift_of_another_shape_is_refused(tmp_path: Path) -> None:
    backbone = quantized_backbone(wide(tmp_path / "llama"))
    live, frozen = LiveAdapter(backbone, PeftConfig(rank=2), LM), FrozenWeights(backbone.model)
    module = "model.layers.0.mlp.up_proj"
    good = shift(live, 1, 0.1)
    bad = AdapterState(
        {f"{module}.lora_A": torch.ones(2, 128), f"{module}.lora_B": torch.ones(64, 2)},
        dataclasses.replace(good.spec, ranks={module: 2}, scaling={module: 1.0}),
    )
    with pytest.raises(ModelError, match=r"changes 'model.layers.0.mlp.up_proj' by \(64, 128\), but the backbone's is \(128, 64\)"):
        frozen.add(bad)


def test_an_adapter_trained_on_nf4_is_merged_into_float32(tmp_path: Path) -> None:
    from fedtune.export.huggingface import export_hf

    folder = wide(tmp_path / "llama")
    live = LiveAdapter(quantized_backbone(folder), PeftConfig(rank=3), LM)
    state = random_state(live)
    live.load(state)
    live.save_peft(tmp_path / "adapter")
    out = export_hf(tmp_path / "adapter", tmp_path / "merged")
    merged = load_backbone(hub(out), LM)
    plain = LiveAdapter(load_backbone(hub(folder), LM), PeftConfig(rank=3), LM)
    plain.load(state)
    assert relative_error(logits(merged), logits(plain.backbone)) < 1e-5
    assert relative_error(logits(merged), logits(live.backbone)) > 1e-3  # they differ by NF4's rounding


@pytest.mark.slow
def test_quantizing_needs_no_whole_model_in_memory(tmp_path: Path) -> None:
    """124 M parameters, 495 MB in float32: a separate process quantizes them with much less memory (measured: 180 to
    320 MB, including pages of the mapped checkpoint, which the system may reclaim). A second process maps the written weights and takes no
    more memory than they have (about 0.8 bytes each, with the embeddings in 16 bits)."""
    args = argparse.Namespace(compute="bf16", shape="2x32", steps=1, threads=1, checkpointing=False)
    in_process(args, "125m", "fp32", str(tmp_path), "make")
    first = []
    for _ in range(3):  # the number of resident mapped pages varies between starts; a whole model would show in each
        first.append(in_process(args, "125m", "nf4", str(tmp_path), "load"))
        if first[-1]["load MB"] - first[-1]["libraries MB"] < 300:
            break
        shutil.rmtree(tmp_path / "cache")
    assert first[-1]["load MB"] - first[-1]["libraries MB"] < 300
    second = in_process(args, "125m", "nf4", str(tmp_path), "load")
    assert second["load MB"] - second["libraries MB"] < 0.8 * 123.7

"""Shifts of the frozen weights: W ← W0 + Σ s·B·A in any storage, and their removal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.shift import FrozenWeights
from tests.models.build import checkpoint, hub, token_ids


def shift(version: int, rank: int, *, module: str = "q", scaling: float = 0.5) -> AdapterState:
    gen = torch.Generator().manual_seed(version)
    tensors = {f"{module}.lora_A": torch.randn(rank, 5, generator=gen), f"{module}.lora_B": torch.randn(3, rank, generator=gen)}
    return AdapterState(tensors, AdapterSpec(method="lora", version=version, ranks={module: rank}, scaling={module: scaling}))


def delta(*shifts: AdapterState) -> torch.Tensor:
    return sum(s.spec.scaling["q"] * s["q.lora_B"].double() @ s["q.lora_A"].double() for s in shifts)  # type: ignore[return-value]


@pytest.mark.parametrize("transposed", [False, True])
def test_shifts_add_up_in_either_storage(transposed: bool) -> None:
    layer = Conv1D(3, 5) if transposed else nn.Linear(5, 3)  # both 5 → 3; GPT-2's stores (in, out)
    model = nn.ModuleDict({"q": layer})
    before = layer.weight.detach().clone().double()
    frozen = FrozenWeights(model)
    frozen.add(shift(2, 4))
    frozen.add(shift(5, 1))
    moved = layer.weight.detach().double() - before
    assert torch.allclose(moved.T if transposed else moved, delta(shift(2, 4), shift(5, 1)), atol=1e-6)
    assert frozen.versions == (2, 5)


def test_bf16_loses_no_small_shift() -> None:
    model: Any = nn.ModuleDict({"q": nn.Linear(5, 3, dtype=torch.bfloat16)})
    with torch.no_grad():
        model["q"].weight.fill_(1.0)  # the next bf16 after 1 is 1.0078: one shift of 0.001 rounds away, ten add up to 0.01
    frozen = FrozenWeights(model)
    for version in range(1, 11):
        tensors = {"q.lora_A": torch.ones(1, 5), "q.lora_B": torch.ones(3, 1)}
        frozen.add(AdapterState(tensors, AdapterSpec(method="lora", version=version, ranks={"q": 1}, scaling={"q": 0.001})))
    assert torch.equal(model["q"].weight.float(), torch.full((3, 5), 1.0078125))


def test_a_newly_loaded_backbone_restores_w0() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"q": nn.Linear(5, 3)})
    fresh: Any = nn.ModuleDict({"q": nn.Linear(5, 3)})
    fresh.load_state_dict(model.state_dict())
    frozen = FrozenWeights(model)
    frozen.add(shift(1, 2))
    assert not torch.equal(model["q"].weight, fresh["q"].weight)
    frozen.reset(fresh)
    assert torch.equal(model["q"].weight, fresh["q"].weight) and frozen.versions == ()


def test_mismatched_shifts_are_refused() -> None:
    frozen = FrozenWeights(nn.ModuleDict({"q": nn.Linear(3, 5), "norm": nn.LayerNorm(5)}))
    with pytest.raises(ModelError, match=r"changes 'q' by \(3, 5\), but the backbone's is \(5, 3\): load the same checkpoint"):
        frozen.add(shift(1, 2))
    with pytest.raises(ModelError, match="changes 'norm', which is not a linear layer"):
        frozen.add(shift(1, 2, module="norm"))
    assert frozen.versions == ()


def test_a_shift_is_merged_whole_or_not_at_all() -> None:
    layer = nn.Linear(5, 3)
    before, frozen = layer.weight.detach().clone(), FrozenWeights(nn.ModuleDict({"q": layer, "up": nn.Linear(4, 3)}))
    good, other = shift(1, 2), shift(2, 2, module="up")  # the second shift is (3, 5), but the layer is (3, 4)
    both = AdapterState({**good.tensors, **other.tensors}, good.spec).replace(scaling={"q": 0.5, "up": 0.5})
    with pytest.raises(ModelError, match="changes 'up' by"):
        frozen.add(both)
    assert torch.equal(layer.weight, before) and frozen.versions == ()
    with pytest.raises(ModelError, match="shapes of a shift's A and B of 'q' do not match"):
        frozen.add(good.replace({"q.lora_A": good["q.lora_A"]}))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_w0_is_restored_under_a_classifiers_wrapped_head(tmp_path: Path, kind: str) -> None:
    task, source = TaskConfig(kind="classification", max_length=32), hub(checkpoint(tmp_path, kind))
    live = LiveAdapter(load_backbone(source, task, num_labels=3), PeftConfig(rank=2), task)
    want, frozen = live.model.eval()(token_ids()).logits, FrozenWeights(live.backbone.model)
    module = next(iter(live.spec.ranks))
    a, b = (0.3 * torch.randn(live.parameters[f"{module}.lora_{x}"].shape) for x in "AB")
    spec = AdapterSpec(method="lora", version=1, ranks={module: 2}, scaling={module: 1.0})
    frozen.add(AdapterState({f"{module}.lora_A": a, f"{module}.lora_B": b}, spec))
    assert not torch.allclose(live.model(token_ids()).logits, want)
    frozen.reset(load_backbone(source, task, num_labels=3).model)
    assert torch.equal(live.model(token_ids()).logits, want) and frozen.versions == ()

"""RAVAN and Fed-SB, compared with results by hand: bases, the layer's output, the weight's change."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.config import PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, initial_adapter, load_backbone
from fedtune.models.methods import method, ravan
from fedtune.models.methods.ravan import bases
from tests.models.build import checkpoint, hub
from tests.models.test_own_methods import CAUSAL, attach, build, shake

AWKWARD = [((1, 2, 2), 3, 5), ((2, 3, 3), 7, 4), ((4, 2, 2), 3, 9), ((1, 1, 1), 1, 6)]  # (h, r, r), out, in


def change(core: Tensor, scale: Tensor | None, out: int, into: int, basis: str = "7", name: str = "q") -> Tensor:
    """The change of a weight (out, in) by a state with these tensors, from the method's own `edits`."""
    tensors = {f"{name}.core": core} | ({} if scale is None else {f"{name}.core_scale": scale})
    state = AdapterState(tensors, AdapterSpec(method="ravan", basis=basis))
    (edit,) = ravan.edits(state, {f"{name}.weight": (out, into)})
    return edit.edit(torch.zeros(out, into, dtype=torch.float64), 0, out)


def test_the_change_is_the_sum_over_heads() -> None:
    core, scale = torch.tensor([[[2.0]], [[5.0]]]), torch.tensor([3.0, -1.0])
    a, b = bases("7", "q", (2, 1, 1), 3, 4)
    # by hand: 3·b_1·2·a_1 − b_2·5·a_2
    expected = 6 * torch.outer(b[0], a[0]) - 5 * torch.outer(b[1], a[1])
    torch.testing.assert_close(change(core, scale, 3, 4).float(), expected)
    torch.testing.assert_close(change(core, None, 3, 4).float(), 2 * torch.outer(b[0], a[0]) + 5 * torch.outer(b[1], a[1]))


@pytest.mark.parametrize(("core", "out", "into"), AWKWARD)
def test_bases_are_orthonormal_as_far_as_they_fit(core: tuple[int, ...], out: int, into: int) -> None:
    for basis, size in zip(bases("0", "q", core, out, into), (into, out), strict=True):
        assert basis.shape == (core[0] * core[1], size)
        for group in basis.split(core[1] * max(1, size // core[1])):
            torch.testing.assert_close(group @ group.T, torch.eye(len(group)), rtol=0, atol=1e-6)


def test_bases_follow_the_seed_and_the_layer_only() -> None:
    first = bases("0", "model.layers.0.q_proj", (2, 2, 2), 6, 5)
    before = torch.get_rng_state()
    assert all(torch.equal(x, y) for x, y in zip(first, bases("0", "model.layers.0.q_proj", (2, 2, 2), 6, 5), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    for other in (("1", "model.layers.0.q_proj"), ("0", "model.layers.1.q_proj")):
        assert not any(torch.allclose(x, y) for x, y in zip(first, bases(*other, (2, 2, 2), 6, 5), strict=True))
    composite = bases("0", "model.language_model.layers.0.q_proj", (2, 2, 2), 6, 5)
    assert all(torch.equal(x, y) for x, y in zip(first, composite, strict=True))
    code = "from fedtune.models.methods.ravan import bases; print(bases('0', 'model.layers.0.q_proj', (2, 2, 2), 6, 5)[0].tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert there.stdout.strip() == str(first[0].tolist())


@pytest.mark.parametrize("rank", [2, 3])
def test_fed_sb_keeps_norms_and_projects_the_gradient(rank: int) -> None:
    a, b = (x.double() for x in bases("3", "q", (1, rank, rank), 5, 4))
    core = torch.randn(1, rank, rank, generator=torch.Generator().manual_seed(0))
    assert float(change(core, None, 5, 4, "3").norm()) == pytest.approx(float(core.norm()), rel=1e-6)  # ‖B·R·A‖ = ‖R‖
    # one SGD step on R with the weight's gradient G: ΔW = −η·B·(Bᵀ·G·Aᵀ)·A, the full step projected on both subspaces
    full = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r = torch.zeros(rank, rank, dtype=torch.float64, requires_grad=True)
    ((b.T @ r @ a) * full).sum().backward()
    assert r.grad is not None
    step = change((-0.1 * r.grad)[None], None, 5, 4, "3")
    torch.testing.assert_close(step, -0.1 * (b.T @ b) @ full @ (a.T @ a), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "core"), [("ravan", 3), ("ravan", 6), ("fedsb", 30)])
def test_a_layer_by_hand(kind: str, name: str, core: int) -> None:
    """Also where h·r exceeds a layer's size, and r does."""
    live = attach(build(kind, CAUSAL), PeftConfig(method=name, heads=4, core=core), CAUSAL)
    assert live.draw is not None
    live.draw("5")
    shake(live)
    at = "model.layers.1.self_attn.k_proj" if kind == "llama" else "transformer.h.1.mlp.c_proj"
    module: Any = live.model.get_submodule(at)
    x = torch.randn(2, 3, module.weight.shape[0] if kind == "gpt2" else module.weight.shape[1], generator=torch.Generator().manual_seed(0))
    weight = module.weight.T if kind == "gpt2" else module.weight
    params = {n.rpartition(".")[2]: p.detach() for n, p in live.parameters.items() if n.rpartition(".")[0] == at}
    delta = change(params["core"], params.get("core_scale"), *weight.shape, basis="5", name=at).float()
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(x), x @ (weight + delta).T + bias, rtol=1e-4, atol=1e-4)
    assert delta.norm() > 0.1


def test_the_check_of_a_layer_detects_swapped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda how, x, core: right(how, x, core.flip(0)))
    with pytest.raises(AssertionError):
        test_a_layer_by_hand("llama", "ravan", 3)


def test_the_bases_are_no_part_of_the_state(tmp_path: Path) -> None:
    model, peft = hub(checkpoint(tmp_path / "m")), PeftConfig(method="ravan", heads=2, core=3)
    drawn = initial_adapter(model, CAUSAL, peft, num_labels=0, seed=11)
    assert {n.rpartition(".")[2] for n in drawn.tensors} == {"core", "core_scale"} and drawn.spec.basis == "11"
    assert drawn["model.layers.0.self_attn.q_proj.core"].shape == (2, 3, 3) and method("ravan").is_noop(drawn)
    assert AdapterSpec.from_json(drawn.spec.to_json()) == drawn.spec
    assert "basis" not in AdapterSpec(method="lora").to_json()  # an earlier version of fedtune reads it
    live = LiveAdapter(load_backbone(model, CAUSAL), peft, CAUSAL)
    live.load(drawn)
    layer: Any = live.model.get_submodule("model.layers.0.self_attn.q_proj")
    one = layer.core_A.clone()
    assert live.read(2).spec.basis == "11" and torch.equal(one, bases("11", "model.layers.0.self_attn.q_proj", (2, 3, 3), 16, 16)[0])
    live.load(drawn.replace(basis="12"))
    assert not torch.allclose(layer.core_A, one)
    with pytest.raises(ModelError, match="the adapter's basis is ''.*the state is damaged"):
        live.load(drawn.replace(basis=""))


def test_a_state_of_another_backbone_is_refused() -> None:
    state = AdapterState({"q.core": torch.zeros(1, 4, 4)}, AdapterSpec(method="fedsb", basis="0"))
    with pytest.raises(ModelError, match=r"'q.core' \(1, 4, 4\) does not fit the backbone"):
        list(ravan.edits(state, {"q.weight": (3, 9)}))
    with pytest.raises(ModelError, match="the adapter lacks the seed of its bases"):
        list(ravan.edits(state.replace(basis=""), {"q.weight": (9, 9)}))

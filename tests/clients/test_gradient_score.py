"""The score of the data-driven mask is the gradient of autograd on the bare backbone."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fedtune.clients.steps import batches
from fedtune.clients.turns import turn_of
from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.data import Example, collate
from fedtune.errors import ModelError, UpdateError
from fedtune.models import LiveAdapter, initial_adapter, load_backbone, loss_sum
from tests.models.build import checkpoint, hub, token_ids
from tests.working import work

TASK, PEFT = TaskConfig(kind="causal_lm", max_length=32), PeftConfig(rank=3, alpha=12.0, dropout=0.5)
PLAN = Plan(round=1, client="c", base_version=4, turn="slora", params={"stage": "gradient"}, batch_size=4, seed=9)
ROWS = [Example(input_ids=i, labels=i) for i in token_ids(7, 8, seed=3).int().numpy()]


def make(folder: Path, kind: str = "llama", **changes: Any) -> LiveAdapter:
    checkpoint(folder, kind)
    live = LiveAdapter(load_backbone(hub(folder, **changes), TASK), PEFT, TASK)
    live.load(initial_adapter(hub(folder), TASK, PEFT, num_labels=0, seed=5))
    return live


def measure(live: LiveAdapter, rows: list[Example] = ROWS) -> AdapterState:
    return turn_of(PLAN).observe(work(live, rows, PLAN, TASK, 2))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_score_is_the_gradient_of_one_batch_in_the_orientation_of_lora(tmp_path: Path, kind: str) -> None:
    live = make(tmp_path / "m", kind)
    before = {n: (p.clone(), p.requires_grad) for n, p in live.model.named_parameters()}
    live.model.train()
    seen = measure(live)
    bare = load_backbone(hub(tmp_path / "m"), TASK).model
    weights = {n: cast(Any, bare.get_submodule(n)).weight.requires_grad_(True) for n in live.spec.ranks}
    chosen = next(batches(7, 4, 9))
    loss, count = loss_sum(bare, collate([ROWS[i] for i in chosen], 2), TASK)
    (loss / count).backward()
    assert seen.spec.version == 4 and list(seen.tensors) == [f"{n}.gradient" for n in weights]
    for name, weight in weights.items():
        rows, columns = live.parameters[f"{name}.lora_B"].shape[0], live.parameters[f"{name}.lora_A"].shape[1]
        expected = weight.grad.abs().T if kind == "gpt2" else weight.grad.abs()
        assert seen[f"{name}.gradient"].shape == (rows, columns) and expected.max() > 1e-3
        torch.testing.assert_close(seen[f"{name}.gradient"], expected, atol=1e-6, rtol=1e-4)
    # the model is unchanged: gradients, flags, mode and weights
    assert live.model.training
    assert all(
        p.grad is None and (p.requires_grad, torch.equal(p, before[n][0])) == (before[n][1], True) for n, p in live.model.named_parameters()
    )


def test_a_bf16_backbone_answers_in_float32(tmp_path: Path) -> None:
    seen = measure(make(tmp_path / "m", precision="bf16"), ROWS[:1])
    assert all(t.dtype == torch.float32 and t.isfinite().all() and t.any() for t in seen.tensors.values())


def test_a_single_overflowing_entry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, whole = make(tmp_path / "m"), torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        result = [g.clone() for g in whole(*args, **kwargs)]
        result[-1].view(-1)[0] = torch.inf
        return result

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(UpdateError, match="^the gradient of 'model.layers.1.* is not finite"):
        measure(live)


def test_the_overflowing_tensor_is_named(tmp_path: Path) -> None:
    live = make(tmp_path / "m")
    with torch.no_grad():
        live.model.get_input_embeddings().weight.mul_(torch.nan)
    with pytest.raises(UpdateError, match="gradient of 'model.layers.0.self_attn.q_proj' is not finite"):
        measure(live)


def test_other_targets_are_refused(tmp_path: Path) -> None:
    live = make(tmp_path / "m")
    layer = next(m for m in live.model.modules() if hasattr(m, "base_layer"))
    layer.base_layer = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ModelError, match="has no floating-point matrix to train"):
        measure(live)

"""task.packing: packed rows have the gradients of separate rows."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config import Config, EngineConfig, PeftConfig, TaskConfig, check
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import IGNORED, Example
from fedtune.data.examples import collate, pack
from fedtune.errors import ConfigError, ModelError
from fedtune.experiment import simulate
from fedtune.models import LiveAdapter, load_backbone, loss_sum
from fedtune.models.probe import probe_packing
from tests.models.build import checkpoint, hub
from tests.tiny import tiny_config

TASK = TaskConfig(kind="causal_lm", max_length=16)


def example(*ids: int, prompt: int = 0) -> Example:
    row = np.array(ids, np.int32)
    labels = row.copy()
    labels[:prompt] = IGNORED
    return Example(row, labels, prompt)


def test_a_pack_by_hand() -> None:
    batch = pack([example(5, 6), example(7, 8, 9, prompt=2), example(3, 4, 5, 6)], 0, 6)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[3, 4, 5, 6, 5, 6], [7, 8, 9, 0, 0, 0]],
        "labels": [[-100, 4, 5, 6, -100, 6], [-100, -100, 9, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]],
    }
    assert pack([example(1, 2, 3)], 0, 2)["input_ids"].tolist() == [[1, 2, 3]]  # a row that is too long stays whole


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_gradients_are_those_of_the_rows_apart(family: str, method: str, tmp_path: Path) -> None:
    live = LiveAdapter(load_backbone(hub(checkpoint(tmp_path / "m", family)), TASK), PeftConfig(method=method, rank=2), TASK)
    torch.manual_seed(3)
    for p in live.parameters.values():
        p.data += 0.1 * torch.randn_like(p)
    generator = np.random.default_rng(4)
    rows = [example(*generator.integers(3, 20, n), prompt=n // 3) for n in (7, 2, 5, 3, 9, 2)]
    grads: list[dict[str, torch.Tensor]] = []
    for batch in (collate(rows, 0), pack(rows, 0, 16), pack(rows, 0, 28)):
        live.model.zero_grad()
        loss, count = loss_sum(live.model, batch, TASK)
        (loss / count).backward()
        assert count == sum(int((e.labels[1:] != IGNORED).sum()) for e in rows)
        grads.append({n: p.grad.clone() for n, p in live.parameters.items() if p.grad is not None})
    assert grads[0] and all(g.abs().max() > 0 for g in grads[0].values())
    for other in grads[1:]:
        for name, g in grads[0].items():
            torch.testing.assert_close(other[name], g, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_ends_with_the_same_adapter_as_unpacked(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, engine=EngineConfig(threads=1, batched="none"))
    ends = []
    for packing in (False, True):
        run = simulate(dataclasses.replace(config, task=dataclasses.replace(config.task, packing=packing)))
        ends.append(AdapterState.load(run / "adapter/fedtune.safetensors").tensors)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-5)  # AdamW divides by small second moments


def test_a_model_that_lets_rows_see_each_other_is_refused(tmp_path: Path) -> None:
    config = hub(checkpoint(tmp_path / "m", "llama"))
    for method, fits in (("lora", True), ("prompt", False), ("prefix", False)):
        live = LiveAdapter(load_backbone(config, TASK), PeftConfig(method=method, rank=2, tokens=3), TASK)
        if fits:
            probe_packing(live, TASK)
            continue
        with pytest.raises(ModelError, match=rf"'llama' with peft.method={method} cannot train packed rows: .*: set task.packing=false"):
            probe_packing(live, TASK)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["task=classification"], "the rows of task.kind=classification cannot be joined: set task.packing=false"),
        (["privacy=record", "privacy.epsilon=8"], "privacy=record clips the gradient of each row: set task.packing=false"),
        (["engine.cache_layers=1"], "engine.cache_layers keeps the activations of each row: set task.packing=false"),
        ([], "task.packing=true trains one client at a time: set engine.batched=none"),
    ],
)
def test_settings_that_exclude_packing(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        compose(["task.packing=true", *(["engine.batched=none"] if settings else []), *settings])


def test_a_composed_config_with_packing() -> None:
    config: Any = compose(["task=chat", "task.packing=true", "engine.batched=none"])[0].config
    assert isinstance(config, Config) and check(config).task.packing

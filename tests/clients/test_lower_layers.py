"""Cached activations of the lower layers do not change a turn's result; training below an adapter is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.clients.lower_layers import LowerLayers
from fedtune.clients.workspace import Workspace
from fedtune.config import EngineConfig, PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.data import pad_id
from fedtune.errors import ConfigError
from fedtune.models import LiveAdapter
from fedtune.simulations.engines.batched import train_together, way_of
from tests.simulations.engines.test_vmapped import CLASSES, LM, build_adapter, rows
from tests.simulations.engines.turns import distance, train_alone, turn_inputs_of
from tests.tiny import tiny_config

UPPER = {
    "llama": ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"],
    "gpt2": ["h.1.attn.c_attn"],
    "opt": ["layers.1.fc2"],
    "distilbert": ["layer.1.ffn.lin2"],
}


def turns(live: LiveAdapter, initial: AdapterState, task: TaskConfig) -> list[AdapterState]:
    return [train_alone(live, turn_input, task, pad_id(live.backbone.tokenizer))[0] for turn_input in turn_inputs_of(rows(task), initial)]


@pytest.mark.parametrize(("kind", "task"), [("llama", LM), ("llama", CLASSES), ("gpt2", LM), ("opt", LM), ("distilbert", CLASSES)])
def test_a_turn_has_the_same_result_with_and_without_the_cache(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    live, initial = build_adapter(tmp_path, kind, PeftConfig(rank=3, targets=UPPER[kind]), task)
    plain = turns(live, initial, task)
    cache = LowerLayers(live, 1e9)
    filled, read = turns(live, initial, task), turns(live, initial, task)
    assert 0 < cache.misses < cache.hits
    for turn_input, a, b, c in zip(turn_inputs_of(rows(task), initial), plain, filled, read, strict=True):
        assert max(distance(a, b), distance(a, c)) <= 1e-4 * distance(a, turn_input.start)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_stacked_training_reads_the_cache_and_vmap_does_not(tmp_path: Path, method: str) -> None:
    live, initial = build_adapter(tmp_path, "llama", PeftConfig(method=method, rank=3, targets=UPPER["llama"]), LM)
    plain = turns(live, initial, LM)
    cache = LowerLayers(live, 1e9)
    way, _ = way_of(live, LM)
    assert way is not None
    for _ in range(2):
        together = train_together(live, turn_inputs_of(rows(LM), initial), LM, pad_id=1, way=way)
    assert (cache.hits > cache.misses) == (method == "lora")
    for turn_input, a, b in zip(turn_inputs_of(rows(LM), initial), plain, together, strict=True):
        assert isinstance(b, tuple) and distance(a, b[0]) <= 1e-4 * distance(a, turn_input.start)


def test_rows_that_do_not_fit_are_recomputed(tmp_path: Path) -> None:
    live, initial = build_adapter(tmp_path, "llama", PeftConfig(rank=3, targets=UPPER["llama"]), LM)
    plain = turns(live, initial, LM)
    cache = LowerLayers(live, 1000)
    again = turns(live, initial, LM)
    assert cache.misses > cache.hits and all(distance(a, b) == 0 for a, b in zip(plain, again, strict=True))


def test_changed_frozen_weights_empty_the_cache(tmp_path: Path) -> None:
    live, initial = build_adapter(tmp_path, "llama", PeftConfig(rank=3, targets=UPPER["llama"]), LM)
    cache = LowerLayers(live, 1e9)
    turns(live, initial, LM)
    before = cache.misses
    cache.clear()
    turns(live, initial, LM)
    assert cache.misses == 2 * before


@pytest.mark.parametrize(
    ("peft", "why"),
    [
        ({}, "the first layer has an adapter"),
        ({"method": "prompt", "tokens": 2}, "'prompt' is trained and changes the lower layers"),
        ({"method": "full"}, "'model.embed_tokens.weight' is trained"),
    ],
)
def test_training_below_the_adapters_is_refused(tmp_path: Path, peft: dict[str, Any], why: str) -> None:
    live, _ = build_adapter(tmp_path, "llama", PeftConfig(rank=3, **peft), LM)
    with pytest.raises(ConfigError, match=why):
        LowerLayers(live, 1e9)


def test_a_backbone_with_dropout_is_refused(tmp_path: Path) -> None:
    live, _ = build_adapter(tmp_path, "llama", PeftConfig(rank=3, targets=UPPER["llama"]), LM)
    live.backbone.model.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="attention_dropout"):
        LowerLayers(live, 1e9)


def test_a_workspace_has_a_cache_if_the_config_enables_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, peft=PeftConfig(rank=2, targets=["layers.1.mlp.up_proj"]))
    assert Workspace(config)._lower is None
    space = Workspace(dataclasses.replace(config, engine=EngineConfig(threads=1, cache_layers=0.1)))
    assert space._lower is not None
    # the cache is emptied when a shift is merged or removed
    turn_input, name = turn_inputs_of(rows(LM), space.initial)[0], "model.layers.0.mlp.up_proj"
    spec = AdapterSpec(method="lora", version=1, ranks={name: 1}, scaling={name: 1.0})
    shift = AdapterState({f"{name}.lora_A": torch.ones(1, 24), f"{name}.lora_B": torch.ones(40, 1)}, spec)
    plain = Workspace(config)
    for base, warm in (((), False), ((), True), ((1,), False), ((1,), True), ((), False)):
        before = space._lower.misses
        for each in (space, plain):
            each.rebase(base, [shift] if base else [])
        cached, expected = (train_alone(each.live, turn_input, config.task, each.pad_id)[0] for each in (space, plain))
        assert distance(cached, expected) < 1e-5 and (space._lower.misses == before) == warm

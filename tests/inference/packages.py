"""Helpers for tests of edge packages."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import Package
from fedtune.inference.engine.reference.tensors import as_tensor
from fedtune.inference.quantize.rtn import QuantizedLinear, dequantize
from fedtune.models import LiveAdapter
from fedtune.models.backbone import quiet
from fedtune.models.checkpoint import NANO
from fedtune.models.shift import FrozenWeights
from tests.models.build import checkpoint


def open_model(folder: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder)


def matrix(package: Package, name: str) -> torch.Tensor:
    """A linear's dequantized weight."""
    kept, tensors = package.linears[name], package.linear(name)
    if kept.kind in ("fp32", "bf16"):
        return as_tensor(tensors["weight"]).float()
    parts = {k: as_tensor(t) for k, t in tensors.items() if k != "bias"}
    return dequantize(QuantizedLinear(kind=kept.kind, group=kept.group, tensors=parts, columns=kept.shape[1], error=0.0))


def tensors_of(package: Package) -> dict[str, torch.Tensor]:
    return {name: as_tensor(array) for name, array in package.tensors.items()}


def save(folder: Path, config: Any, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A random checkpoint of that shape, biases and norms random too."""
    checkpoint(folder)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
        os.remove(folder / "model.safetensors")
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


AWKWARD = {"hidden_size": 18, "intermediate_size": 37, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 35}


def with_shifts(run: Path, live: LiveAdapter) -> FrozenWeights:
    frozen = FrozenWeights(live.backbone.model)
    generator = torch.Generator().manual_seed(7)
    for version in (1, 2):
        spec = live.spec
        tensors = {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in live.parameters.items()}
        shift = AdapterState(tensors, AdapterSpec(method="lora", ranks=spec.ranks, scaling=spec.scaling, version=version))
        shift.save(run / "adapter" / f"shift-{version:04d}.safetensors")
        frozen.add(shift)
    return frozen


def engine_logits(folder: Path, ids: torch.Tensor, adapter: str | None = None) -> torch.Tensor:
    engine = load_engine(folder)
    cache = engine.cache()
    engine.start(cache)
    return torch.from_numpy(engine.decoder.forward(ids.numpy(), [Span(cache, len(ids), keep=None, adapter=adapter)]))


TEXT = "turn on the light in a room\n\nset the heat in the kitchen to two\n\n" * 30


def nano_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    return folder

"""A single layer equals the engine's decoder layer, and the inputs of its linears are reported correctly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.layout import linears
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.shape import canonical
from fedtune.inference.quantize.layers import embedded, observe, pass_layer
from tests.inference.engine.tiny import SHAPES, VOCAB, tiny_model


def texts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.mark.parametrize("name", SHAPES)
def test_the_layers_in_sequence_equal_the_decoder(tmp_path: Path, name: str) -> None:
    tiny_model(name, tmp_path)
    engine, tensors, ids = load_engine(tmp_path, "fp32"), load_file(tmp_path / "model.safetensors"), texts(13, 1, 15)
    tensors = {canonical(n): t for n, t in tensors.items()}
    hidden = embedded(engine.shape, lambda n, a, b: tensors[n][a:b], ids)
    for index in range(engine.shape.layers):
        at = f"model.layers.{index}."
        hidden = pass_layer(engine.shape, index, {n[len(at) :]: t for n, t in tensors.items() if n.startswith(at)}, hidden)
    for own, h in zip(ids, hidden, strict=True):
        wanted = torch.from_numpy(engine.decoder.run(engine.decoder.embed(own.numpy()), [Span(engine.cache(), len(own))]))
        assert torch.allclose(h, wanted, atol=1e-4, rtol=1e-4)


def test_the_statistics_are_those_of_the_linears_inputs(tmp_path: Path) -> None:
    tiny_model("qwen3", tmp_path)
    shape, tensors = load_engine(tmp_path).shape, load_file(tmp_path / "model.safetensors")
    hidden = embedded(shape, lambda n, a, b: tensors[n][a:b], texts(9, 20))
    layer = {n.removeprefix("model.layers.0."): t for n, t in tensors.items() if n.startswith("model.layers.0.")}
    stats = observe(shape, 0, layer, hidden)
    assert stats.keys() == linears(shape).keys()
    for name, fused in linears(shape).items():
        for module in fused.modules:
            assert layer[f"{module}.weight"].shape[1] == len(stats[name].mean)
    x = torch.rms_norm(torch.cat(list(hidden)), (shape.hidden,), layer["input_layernorm.weight"], shape.eps)
    assert torch.allclose(stats["qkv"].hessian, x.T @ x / 29, atol=1e-5)
    assert torch.allclose(stats["qkv"].mean, x.abs().mean(0), atol=1e-6)
    assert torch.allclose(stats["qkv"].greatest, x.abs().amax(0))
    # statistics of inputs divided by a scale
    scale = torch.rand(shape.hidden, generator=torch.Generator().manual_seed(1)) + 0.5
    scaled, y = stats["qkv"].scaled(scale), x / scale
    assert torch.allclose(scaled.hessian, y.T @ y / 29, atol=1e-4)
    assert torch.allclose(scaled.mean, y.abs().mean(0), atol=1e-5) and torch.allclose(scaled.greatest, y.abs().amax(0), atol=1e-5)


def test_foreign_tokens_are_refused(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    shape = load_engine(tmp_path).shape
    with pytest.raises(ModelError, match="out of range 0..100"):
        embedded(shape, lambda n, a, b: torch.zeros(b - a, shape.hidden), [torch.tensor([3, VOCAB])])

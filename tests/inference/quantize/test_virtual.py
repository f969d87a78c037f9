"""Virtual tokens: a layer after a prompt or a prefix has the same inputs as in the engine's decoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.reference.linears import TorchLinear, apply
from fedtune.inference.quantize.layers import InputStats, embedded, observe, pass_layer, prefix_of
from fedtune.inference.quantize.model import QuantizeSettings, quantize_model
from fedtune.inference.quantize.rtn import QuantizedLinear, dequantize, relative_error
from tests.inference.engine.tiny import VOCAB, tiny_model

LENGTHS = (13, 1, 17)
NAMES = ["llama", "qwen3", "mistral", "llama_yarn_mscale"]  # mistral's window of 6 excludes the virtual tokens


def texts(*lengths: int) -> list[Tensor]:
    return [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def open_engine(folder: Path, name: str, kind: str) -> tuple[Engine, dict[str, Tensor], dict[str, Tensor]]:
    """The engine with virtual tokens of a kind, the model's tensors, and the virtual tokens."""
    tiny_model(name, folder)
    engine, tensors, draws = load_engine(folder, "fp32"), load_file(folder / "model.safetensors"), torch.Generator().manual_seed(9)
    shape = engine.shape
    if kind == "prompt":
        prompt = torch.randn(7, shape.hidden, generator=draws)
        engine.prompt = prompt.numpy()
        return engine, tensors, {"prompt.embeds": prompt}
    k, v = (2 * torch.randn(shape.layers, 7, shape.kv_heads, shape.head_dim, generator=draws) for _ in "kv")
    engine.prefix = k.numpy(), v.numpy()
    return engine, tensors, {"prefix.k": k, "prefix.v": v}


def layer_tensors(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    at = f"model.layers.{index}."
    return {n.removeprefix(at): t for n, t in tensors.items() if n.startswith(at)}


def engine_logits(engine: Engine, ids: Tensor) -> Tensor:
    """Logits [n, V] of a text after the engine's virtual tokens."""
    cache = engine.cache(limit=engine.virtual_length + len(ids))
    engine.start(cache)
    return torch.from_numpy(engine.decoder.forward(ids.numpy(), [Span(cache, len(ids), keep=None)]))


@pytest.mark.parametrize("name", NAMES)
def test_the_layers_after_a_prefix_equal_the_decoder(tmp_path: Path, name: str) -> None:
    engine, tensors, virtual = open_engine(tmp_path, name, "prefix")
    hidden = embedded(engine.shape, lambda n, a, b: tensors[n][a:b], ids := texts(*LENGTHS))
    for index in range(engine.shape.layers):
        hidden = pass_layer(engine.shape, index, layer_tensors(tensors, index), hidden, prefix_of(virtual, index))
    for own, h in zip(ids, hidden, strict=True):
        cache = engine.cache()
        engine.start(cache)
        wanted = torch.from_numpy(engine.decoder.run(engine.decoder.embed(own.numpy()), [Span(cache, len(own))]))
        assert torch.allclose(h, wanted, atol=1e-4, rtol=1e-4)


class RecordingLinear(TorchLinear):
    """A linear that records statistics of its inputs."""

    def __init__(self, own: Any) -> None:
        super().__init__(own.parts, n_in=own.n_in, n_out=own.n_out)
        self.kind, self.own, self.watch = own.kind, own, InputStats(own.n_in)

    def __call__(self, x: Tensor) -> Tensor:
        self.watch.add(x)
        return apply(self.own, x)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_calibration_observes_the_inputs_of_the_models_linears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Checks the first layer, whose inputs do not depend on rounding: `down` is after attention and the virtual tokens."""
    engine, tensors, virtual = open_engine(tmp_path, "qwen3", kind)
    seen: list[Tensor] = []

    def record_observe(*args: Any) -> Any:
        result = observe(*args)
        seen.append(result["down"].hessian)
        return result

    monkeypatch.setattr("fedtune.inference.quantize.model.observe", record_observe)
    list(quantize_model(engine.shape, lambda n, a, b: tensors[n][a:b], QuantizeSettings(method="gptq"), texts(*LENGTHS), virtual))
    engine.decoder.layers[0].down = recorder = RecordingLinear(engine.decoder.layers[0].down)
    for ids in texts(*LENGTHS):
        engine_logits(engine, ids)  # the virtual tokens of a prompt are read too, once per text
    torch.testing.assert_close(seen[0], recorder.watch.stats().hessian, rtol=1e-4, atol=1e-5)
    plain = observe(engine.shape, 0, layer_tensors(tensors, 0), embedded(engine.shape, lambda n, a, b: tensors[n][a:b], texts(*LENGTHS)))
    assert relative_error(plain["down"].hessian, seen[0]) > 0.05  # without virtual tokens the statistics differ


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_the_quantized_model_with_virtual_tokens_stays_close(tmp_path: Path, kind: str, method: str) -> None:
    """A fold through the values' linear would not scale the prefix's own values, which would change the model."""
    engine, tensors, virtual = open_engine(tmp_path, "llama_one_kv", kind)
    (ids,) = texts(19)
    wanted = engine_logits(engine, ids)
    recipe = QuantizeSettings(kind="int8", group=0, method=method)  # pyright: ignore[reportArgumentType]
    for name, made in quantize_model(engine.shape, lambda n, a, b: tensors[n][a:b], recipe, texts(*LENGTHS), virtual):
        tensors[name] = dequantize(made) if isinstance(made, QuantizedLinear) else made
    actual = quantized_engine(tmp_path / "q", tensors, engine)
    # rounding costs .020 to .033 of these random weights; folding through the values, which leaves the prefix's, .15 and .22
    assert relative_error(engine_logits(actual, ids), wanted) < 0.05


def quantized_engine(folder: Path, tensors: dict[str, Tensor], engine: Engine) -> Engine:
    """The engine of these tensors, untied, with the virtual tokens of another."""
    folder.mkdir()
    config = json.loads((engine.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    out = load_engine(folder, "fp32")
    out.prompt, out.prefix = engine.prompt, engine.prefix
    return out

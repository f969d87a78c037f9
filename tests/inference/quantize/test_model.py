"""Quantizing a complete decoder layer by layer: outputs and their order, memory, and the benefit of calibration."""

import itertools
import weakref
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.layout import linears
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.package import tensor_shapes
from fedtune.inference.engine.shape import Shape
from fedtune.inference.quantize import model as module
from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.layers import Read
from fedtune.inference.quantize.model import METHODS, QuantizeSettings, quantize_model
from fedtune.inference.quantize.rtn import QuantizedLinear
from tests.inference.engine.tiny import VOCAB, tiny_model
from tests.inference.quantize.whole import quantize_linear

INT8: dict[str, Any] = {"kind": "int8", "group": 0}
FIRST = "model.layers.0."


def open_model(folder: Path, name: str) -> tuple[Shape, Read, dict[str, Tensor]]:
    tiny_model(name, folder)
    tensors = load_file(folder / "model.safetensors")
    return load_engine(folder).shape, lambda n, a, b: tensors[n][a:b], tensors


def text(count: int = 6, length: int = 20) -> list[Tensor]:
    draws = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=draws) for _ in range(count)]


def quantize_all(shape: Shape, read: Read, recipe: QuantizeSettings) -> dict[str, Tensor | QuantizedLinear]:
    return dict(quantize_model(shape, read, recipe, text()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama_one_kv", "llama_biases", "qwen3", "mistral"])
def test_all_tensors_are_returned_and_those_of_linears_are_quantized(tmp_path: Path, name: str, method: str) -> None:
    shape, read, tensors = open_model(tmp_path, name)
    before = {n: t.clone() for n, t in tensors.items()}
    recipe = QuantizeSettings(kind="int8", group=0, method="smoothquant") if method == "smoothquant" else QuantizeSettings(method=method)  # pyright: ignore
    out = quantize_all(shape, read, recipe)
    sizes = dict(tensor_shapes(shape)) | {"lm_head.weight": (shape.vocab, shape.hidden)}
    assert set(out) == set(sizes) - {"model.embed_tokens.weight"}
    for key, value in out.items():
        assert isinstance(value, QuantizedLinear) == key.endswith(("_proj.weight", "lm_head.weight"))
        if isinstance(value, QuantizedLinear):
            assert (value.tensors["packed"].shape[0], value.columns) == sizes[key]
            assert value.kind == ("int8" if key == "lm_head.weight" else recipe.kind)
            assert 0 < value.error < (0.15 if value.kind == "int4" else 0.02)
        else:
            assert tuple(value.shape) == sizes[key] and value.dtype == torch.float32 and torch.isfinite(value).all()
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())  # nothing is changed in place


def test_rtn_needs_no_text_and_reads_one_tensor_at_a_time(tmp_path: Path) -> None:
    shape, read, tensors = open_model(tmp_path, "llama")
    seen, quantized = list[str](), set[str]()
    for name, value in quantize_model(shape, lambda n, a, b: (seen.append(n), read(n, a, b))[1], QuantizeSettings()):
        assert seen[-1] == name or name in ("model.norm.weight", "lm_head.weight")
        if isinstance(value, QuantizedLinear):
            quantized.add(name)
            wanted = quantize_linear(tensors[name], QuantizeSettings().of_head if name == "lm_head.weight" else QuantizeSettings())
            assert all(torch.equal(value.tensors[k], wanted.tensors[k]) for k in wanted.tensors) and value.output_error is None
    assert quantized == {n for n, _ in tensor_shapes(shape) if n.endswith("_proj.weight")} | {"lm_head.weight"}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_only_one_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    shape, read, _ = open_model(tmp_path, "llama")
    alive: dict[int, list[weakref.ref[Tensor]]] = {}
    most: dict[int, int] = {}  # layer → tensors and Hessians of other layers that were alive while it was read or observed

    def count(layer: int) -> None:
        others = sum(r() is not None for k, refs in alive.items() if k != layer for r in refs)
        most[layer] = max(most.get(layer, 0), others)

    def record_read(name: str, first: int, last: int) -> Tensor:
        part = read(name, first, last).clone()
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            count(layer)
            alive.setdefault(layer, []).append(weakref.ref(part))
        return part

    whole = module.observe

    def record_observe(shape: Shape, index: int, *rest):  # noqa: ANN002, ANN202  # pyright: ignore[reportMissingParameterType]
        count(index)
        out = whole(shape, index, *rest)
        alive[index] += [weakref.ref(s.hessian) for s in out.values()]
        return out

    monkeypatch.setattr(module, "observe", record_observe)
    order = []
    for name, value in quantize_model(shape, record_read, QuantizeSettings(method=method), text()):  # pyright: ignore[reportArgumentType]
        order.append(name)
        del value
    assert most == {0: 0, 1: 0, 2: 0}
    assert [n.split(".")[2] for n in order if "layers" in n] == sorted(n.split(".")[2] for n in order if "layers" in n)
    # a layer's tensors are read for observation and for rounding (awq: also for its search): 7 linears, 2 norms, 4 Hessians
    assert all(len(refs) >= 2 * 7 + 2 * 2 + 4 for refs in alive.values())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_layer_is_calibrated_on_outputs_of_the_quantized_layers_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    shape, read, _ = open_model(tmp_path, "llama")
    whole, met = module.observe, list[Tensor]()

    def record_observe(shape: Shape, index: int, tensors: Any, hidden: Any, *rest: Any) -> Any:
        met.append(torch.cat([h.clone() for h in hidden]))
        return whole(shape, index, tensors, hidden, *rest)

    monkeypatch.setattr(module, "observe", record_observe)
    out = quantize_all(shape, read, QuantizeSettings(method=method))  # pyright: ignore[reportArgumentType]
    assert len(met) == shape.layers == 3
    for index in (0, 1):
        at = f"model.layers.{index}."
        hidden = Hidden([20] * 6, shape.hidden)
        hidden.put(0, met[index])
        layer = {n.removeprefix(at): v for n, v in out.items() if n.startswith(at)}
        after = module.pass_layer(
            shape, index, {n: module.dequantize(v) if isinstance(v, QuantizedLinear) else v for n, v in layer.items()}, hidden
        )
        assert torch.allclose(met[index + 1], torch.cat(list(after)), atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"group": 64}, INT8], ids=str)
def test_calibrated_layers_are_closer_on_the_calibration_text(tmp_path: Path, form: dict[str, Any]) -> None:
    shape, read, tensors = open_model(tmp_path, "qwen2")
    layer = {n.removeprefix(FIRST): t for n, t in tensors.items() if n.startswith(FIRST)}
    stats = module.observe(shape, 0, layer, module.embedded(shape, read, text()))
    plain = {
        m: quantize_linear(layer[f"{m}.weight"], QuantizeSettings(**form), stats[f]) for f, of in linears(shape).items() for m in of.modules
    }
    gptq, again, awq = (first_layer(shape, read, QuantizeSettings(method=m, **form)) for m in ("gptq", "gptq", "awq"))
    rounded = {m: q.output_error or 0 for m, q in plain.items()}
    assert all((gptq[m].output_error or 1) < rounded[m] for m in rounded)
    assert fmean(q.output_error or 1 for q in gptq.values()) < 0.9 * fmean(rounded.values())
    assert fmean(q.output_error or 1 for q in awq.values()) <= 1.001 * fmean(rounded.values())
    # the same text gives the same codes, bit for bit
    assert all(torch.equal(gptq[m].tensors[k], t) for m in gptq for k, t in again[m].tensors.items())


def first_layer(shape: Shape, read: Read, recipe: QuantizeSettings) -> dict[str, QuantizedLinear]:
    """Linears of the first layer, which all methods calibrate on the same inputs."""
    parts = itertools.takewhile(lambda part: part[0].startswith(FIRST), quantize_model(shape, read, recipe, text()))
    return {n.removeprefix(FIRST).removesuffix(".weight"): q for n, q in parts if isinstance(q, QuantizedLinear)}


def test_rows_are_processed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    x = torch.randn(99, 48, generator=torch.Generator().manual_seed(1))
    stats = module.Stats(hessian=x.T @ x / 99, mean=x.abs().mean(0), greatest=x.abs().amax(0))
    for recipe in (QuantizeSettings(method="gptq"), QuantizeSettings(**INT8)):
        whole = quantize_linear(weight, recipe, stats)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_STRETCH", 480)
            parts = quantize_linear(weight, recipe, stats)
        assert all(torch.equal(whole.tensors[k], parts.tensors[k]) for k in whole.tensors)
        assert parts.error == pytest.approx(whole.error) and parts.output_error == pytest.approx(whole.output_error)


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose from rtn, gptq"):
        QuantizeSettings(method="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="use method=awq or gptq"):
        QuantizeSettings(method="smoothquant")
    shape, read, _ = open_model(tmp_path, "llama")
    with pytest.raises(ConfigError, match="calibration text"):
        next(quantize_model(shape, read, QuantizeSettings(method="awq")))
    with pytest.raises(ModelError, match="out of range"):
        next(quantize_model(shape, read, QuantizeSettings(method="awq"), [torch.tensor([VOCAB])]))
    with pytest.raises(ModelError, match="calibration text"):
        quantize_linear(torch.zeros(2, 32), QuantizeSettings(method="gptq"))

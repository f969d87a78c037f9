"""The advice in errors of quantization."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.layers import Stats
from fedtune.inference.quantize.model import QuantizeSettings, quantize_model
from fedtune.inference.quantize.perplexity import windows
from tests.advised.rows import Place, error_of, follows
from tests.inference.quantize.test_gptq import layer
from tests.inference.quantize.test_model import open_model, text
from tests.inference.quantize.whole import quantize_linear

GPTQ = QuantizeSettings(method="gptq")
WEIGHT, HESSIAN = layer(4, 40)


def round_error(how: QuantizeSettings, hessian: torch.Tensor | None = HESSIAN, weight: torch.Tensor = WEIGHT) -> str:
    """The error of quantizing a weight; "" if there is none."""
    stats = None if hessian is None else Stats(hessian=hessian, mean=torch.ones(40), greatest=torch.ones(40))
    return error_of(lambda: quantize_linear(weight, how, stats))


@follows("there is no quantization method '{}': choose from {}")
def _(place: Place) -> Iterator[str]:
    def method_error(method: Any) -> str:
        return error_of(lambda: QuantizeSettings(kind="int8", group=0, method=method))

    error = method_error("best")
    yield error
    for method in error.rpartition("from ")[2].split(", "):
        yield method_error(method)


@follows("smoothquant is for int8 activations, which {} does not have: use method=awq or gptq")
def _(place: Place) -> Iterator[str]:
    for method in ("smoothquant", "awq", "gptq"):
        yield error_of(lambda method=method: QuantizeSettings(method=method))


@follows("gptq needs statistics of the inputs: give calibration text")
def _(place: Place) -> Iterator[str]:
    yield round_error(GPTQ, None)
    yield round_error(GPTQ)


@follows("the Hessian of a layer's inputs cannot be inverted: calibrate with more text, or use method=awq or rtn")
def _(place: Place) -> Iterator[str]:
    few = torch.full((40, 40), 10.0).fill_diagonal_(1)
    yield round_error(GPTQ, few)
    yield round_error(GPTQ)
    for method in ("awq", "rtn"):
        yield round_error(replace(GPTQ, method=method), few)


@follows("the calibration text gave activations that are not finite: check the model, or quantize with method=rtn")
def _(place: Place) -> Iterator[str]:
    for method in ("gptq", "rtn"):
        yield round_error(replace(GPTQ, method=method), HESSIAN * torch.nan)


@follows("a weight {} has values that are not finite: train or merge the model again")
def _(place: Place) -> Iterator[str]:
    for weight in (WEIGHT * torch.nan, WEIGHT):
        yield round_error(GPTQ, HESSIAN, weight)


@follows("method={} needs calibration text: give some, or use method=rtn", slow=True)
def _(place: Place) -> Iterator[str]:
    shape, read, _ = open_model(place.folder, "llama_one_kv")
    ways: list[tuple[Any, list[torch.Tensor]]] = [("awq", []), ("awq", text()), ("rtn", [])]
    for method, given in ways:
        recipe = QuantizeSettings(method=method)
        yield error_of(lambda recipe=recipe, given=given: list(quantize_model(shape, read, recipe, given)))


@follows("perplexity needs at least two tokens and overlapping windows")
def _(place: Place) -> Iterator[str]:
    for count in (1, 9):
        yield error_of(lambda count=count: list(windows(torch.arange(count), 4)))


@follows("the temporary file of hidden states ends before row {}: check the disk space")
def _(place: Place) -> Iterator[str]:
    kept = Hidden([3, 2], 4, place.folder)
    kept.put(0, torch.ones(5, 4))
    os.ftruncate(kept._file.fileno(), 40)
    yield error_of(lambda: kept[1])
    kept.put(0, torch.ones(5, 4))  # the disk has space again
    yield error_of(lambda: kept[1])

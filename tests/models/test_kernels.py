"""Whether bitsandbytes can train in a precision on this machine, tested on one small layer."""

import re

import pytest
import torch

quantize = pytest.importorskip("fedtune.models.quantize", exc_type=ImportError)
CPU = torch.device("cpu")
why_not = quantize._why_not.__wrapped__  # without its cache
WORKING = [p for p in quantize.KINDS if not why_not(p, torch.float32, CPU)]


@pytest.mark.parametrize(("asked", "layer", "other"), [("nf4", "Linear4bit", "int8"), ("int8", "Linear8bitLt", "nf4")])
def test_a_precision_is_tried_in_its_own_layer(monkeypatch: pytest.MonkeyPatch, asked: str, layer: str, other: str) -> None:
    class Broken(getattr(quantize.bnb.nn, layer)):
        def __init__(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("no such symbol")

    before = why_not(other, torch.float32, CPU)
    monkeypatch.setattr(quantize.bnb.nn, layer, Broken)
    assert why_not(asked, torch.float32, CPU) == "no such symbol" and why_not(other, torch.float32, CPU) == before


@pytest.mark.parametrize("precision", WORKING)
@pytest.mark.parametrize(
    ("times", "sentence"),
    [(1.3, "its weights are off by [23][0-9]%"), (1.1, "its gradient is off by 17%"), (1.0, "")],  # 1 - 1 / 1.1², as it is x·Wᵀ·W
)
def test_a_kernel_with_wrong_weights_is_detected(monkeypatch: pytest.MonkeyPatch, precision: str, times: float, sentence: str) -> None:
    weight_of = quantize.weight_of
    monkeypatch.setattr(quantize, "weight_of", lambda module: times * weight_of(module))
    assert re.fullmatch(sentence, why_not(precision, torch.float32, CPU))

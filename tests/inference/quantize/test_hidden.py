"""Hidden states on disk during quantization round-trip, and weights are the same at each read."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.inference.quantize.fold import Fold, folds
from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.layers import embedded
from fedtune.inference.quantize.model import QuantizeSettings, quantize_rows
from fedtune.inference.quantize.rtn import dequantize
from fedtune.inference.quantize.weights import Weights
from tests.inference.engine.tiny import VOCAB
from tests.inference.quantize.test_model import open_model
from tests.inference.quantize.whole import quantize_linear


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_sequences_are_read_back_whole_and_in_batches(lengths: list[int], most: int) -> None:
    hidden, wanted = Hidden(lengths, 7), torch.randn(sum(lengths), 7)
    hidden.put(0, wanted)
    assert all(torch.equal(h, w) for h, w in zip(hidden, wanted.split(lengths), strict=True))
    seen, end = list[int](), 0
    for first, some in hidden.batches(most):
        assert first == end and (sum(some) <= most or len(some) == 1)
        seen, end = [*seen, *some], first + sum(some)
    assert seen == lengths


def test_the_file_has_no_name_and_is_deleted_with_its_object(tmp_path: Path) -> None:
    hidden = Hidden([3, 2], 4, tmp_path)
    hidden.put(2, torch.ones(2, 4))
    hidden.put(4, torch.zeros(1, 4))
    assert hidden[1].shape == (2, 4) and hidden[-1][0].tolist() == [1.0] * 4 and len(hidden[0:2]) == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError):
        hidden[2]


def test_a_prompt_precedes_every_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.inference.quantize.layers._STRETCH", 50)  # a row or two of the table at a time
    shape, read, tensors = open_model(tmp_path, "llama")
    text = [torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 1, 5)]
    before = torch.randn(2, shape.hidden)
    table = tensors["model.embed_tokens.weight"]
    for own, h in zip(text, embedded(shape, read, text, before), strict=True):
        assert torch.equal(h, torch.cat([before, table[own]]))


def test_folds_are_applied_to_weights_in_their_order(tmp_path: Path) -> None:
    """`v_proj` reads one scale and is the source of the next. Checked by rows and whole."""
    shape, read, tensors = open_model(tmp_path, "llama_biases")
    at, sizes = "model.layers.0.", {n: tuple(t.shape) for n, t in tensors.items()}
    weights = Weights({n[len(at) :]: n for n in sizes if n.startswith(at)}, sizes, read)
    one, two = torch.rand(shape.hidden) + 0.5, torch.rand(shape.kv_heads * shape.head_dim) + 0.5
    weights.fold(folds(shape)[0], one, 1)
    weights.fold(Fold("self_attn.v_proj", ()), two, 1)
    name = "self_attn.v_proj.weight"
    wanted = tensors[at + name] * one / two[:, None]
    assert torch.equal(weights[name], wanted) and torch.equal(weights.rows(name, 3, 5), wanted[3:5])
    assert torch.equal(weights["input_layernorm.weight"], tensors[f"{at}input_layernorm.weight"] / one)
    assert torch.equal(weights["self_attn.v_proj.bias"], tensors[f"{at}self_attn.v_proj.bias"] / two)
    assert set(weights) == {n[len(at) :] for n in sizes if n.startswith(at)} and len(weights) == len(set(weights))


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_rows_read_in_parts_are_quantized_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(13, 44, generator=torch.Generator().manual_seed(0))
    recipe = QuantizeSettings(kind=kind, group=32 if kind == "int4" else 0)  # pyright: ignore[reportArgumentType]
    whole = quantize_linear(weight, recipe)
    for module in ("model", "rtn"):
        monkeypatch.setattr(f"fedtune.inference.quantize.{module}._STRETCH", 100)
    seen: list[tuple[int, int]] = []
    parts = quantize_rows(lambda a, b: (seen.append((a, b)), weight[a:b])[1], (13, 44), recipe)
    assert seen == [(a, min(a + 2, 13)) for a in range(0, 13, 2)]
    assert all(torch.equal(parts.tensors[k], t) for k, t in whole.tensors.items()) and parts.error == pytest.approx(whole.error)
    assert torch.equal(dequantize(parts), dequantize(whole)) and (dequantize(parts) - weight).abs().max() < 0.5

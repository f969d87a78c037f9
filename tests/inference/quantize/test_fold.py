"""Folding moves scales between weights without changing outputs, in every supported kind of layer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
from fedtune.inference.quantize.fold import Fold, changes, folds, tied, within
from fedtune.inference.quantize.rtn import relative_error
from tests.inference.engine.tiny import VOCAB, tiny_model

NAMES = [
    "llama",
    "llama_one_kv",
    "llama_mha",
    "llama_biases",
    "qwen2",
    "qwen3_biases",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "phi4_mini",
    "smollm3",
    "olmo2",
]


def logits(folder: Path) -> Tensor:
    engine = load_engine(folder, "fp32")
    ids = torch.randint(0, VOCAB, (23,), generator=torch.Generator().manual_seed(3))
    return torch.from_numpy(engine.decoder.forward(ids.numpy(), [Span(engine.cache(), len(ids), keep=None)]))


def folded_tensors(layer: dict[str, Tensor], fold: Fold, scale: Tensor, width: int = 1) -> dict[str, Tensor]:
    """The tensors that a fold changes."""
    result = changes(fold, scale, layer[f"{fold.source}.weight"].shape[0], width)
    return {n: change(layer[n], 0, len(layer[n])) for n, change in result.items() if n in layer}


def fold_all(folder: Path, readers_only: bool = False) -> None:
    """Fold scales between 1/4 and 4 at every point of a model folder, in place."""
    path = folder / "model.safetensors"
    tensors, shape, draws = load_file(path), load_engine(folder).shape, torch.Generator().manual_seed(1)
    for index in range(shape.layers):
        at = f"model.layers.{index}."
        layer = {n.removeprefix(at): t for n, t in tensors.items() if n.startswith(at)}
        for fold in folds(shape):
            columns, rows = layer[f"{fold.readers[0]}.weight"].shape[1], layer[f"{fold.source}.weight"].shape[0]
            scale = tied(4 ** (2 * torch.rand(columns, generator=draws) - 1), columns // rows, shape.head_dim)
            changed = folded_tensors(layer, fold, scale, shape.head_dim)
            layer |= {n: t for n, t in changed.items() if not (readers_only and n.startswith(fold.source))}
        tensors |= {at + n: t.contiguous() for n, t in layer.items()}
    if not shape.tied:
        whole = {n.removeprefix("model."): t for n, t in tensors.items() if n in ("model.norm.weight", "lm_head.weight")}
        whole |= folded_tensors(
            whole, Fold("norm", ("lm_head",), shape.norm_offset), 4 ** (2 * torch.rand(shape.hidden, generator=draws) - 1)
        )
        tensors |= {"model.norm.weight": whole["norm.weight"], "lm_head.weight": whole["lm_head.weight"]}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", NAMES)
def test_the_folded_model_equals_the_model(tmp_path: Path, name: str) -> None:
    tiny_model(name, tmp_path)
    before = logits(tmp_path)
    fold_all(tmp_path)
    assert relative_error(logits(tmp_path), before) < 1e-5


def test_half_a_fold_changes_the_model(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    before = logits(tmp_path)
    fold_all(tmp_path, readers_only=True)
    assert relative_error(logits(tmp_path), before) > 0.1


def test_folds_by_hand() -> None:
    layer = {"mlp.up_proj.weight": torch.tensor([[2.0], [3.0]]), "mlp.up_proj.bias": torch.tensor([4.0, 6.0]),
             "mlp.down_proj.weight": torch.tensor([[10.0, 20.0]])}  # fmt: skip
    out = folded_tensors(layer, Fold("mlp.up_proj", ("mlp.down_proj",)), torch.tensor([2.0, 0.5]))
    assert out["mlp.up_proj.weight"].tolist() == [[1.0], [6.0]] and out["mlp.up_proj.bias"].tolist() == [2.0, 12.0]
    assert out["mlp.down_proj.weight"].tolist() == [[20.0, 10.0]]
    assert layer["mlp.up_proj.bias"].tolist() == [4.0, 6.0]


def test_query_heads_of_one_key_value_head_share_their_scale() -> None:
    # two key-value heads, each read by two query heads of width 2: (1 + 3) / 2, (2 + 6) / 2, then (10 + 30) / 2 …
    values = torch.tensor([1.0, 2, 3, 6, 10, 20, 30, 60])
    assert tied(values, 2, 2).tolist() == [2.0, 4, 2, 4, 20, 40, 20, 40]
    assert tied(values, 1, 3) is values


def test_scales_are_finite_and_within_bounds() -> None:
    out = within(torch.tensor([0.0, float("nan"), float("inf"), 4.0, 0.25]))
    assert out.tolist() == [1.0, 1.0, 1.0, 4.0, 0.25]
    assert within(torch.tensor([8.0, 2.0])).tolist() == [2.0, 0.5]  # / sqrt(16)

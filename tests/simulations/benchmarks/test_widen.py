"""A widened model has the logits, greedy text and number formats of the small one; other models are refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.generate import Generation, Speculation
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.speculate.adapt import Adapt
from fedtune.inference.engine.speculate.early_exit import EarlyExit
from fedtune.simulations.benchmarks.inference.models import SIZES, VOCABULARY, package
from fedtune.simulations.benchmarks.inference.widen import Size, widen
from tests.inference.engine.engines import build

DATA = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[3] / "../shared/data")).resolve()
needs_data = pytest.mark.skipif(not (DATA / "models").is_dir(), reason="needs FEDTUNE_DATA with models")
BASE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip


def tiny(folder: Path, **changes: Any) -> tuple[Path, Any]:
    """A random Llama with norms other than 1 and an eps large enough to matter."""
    torch.manual_seed(3)
    config = LlamaConfig(**{**BASE, **changes})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if "norm" in name else parameter.copy_(0.25 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model


def size(**changes: int) -> Size:
    return Size(**{"hidden": 96, "layers": 5, "heads": 8, "kv_heads": 2, "inner": 72, "vocabulary": 83, **changes})


def logits(engine: Engine, ids: Tensor) -> Tensor:
    return torch.from_numpy(engine.decoder.forward(ids.numpy(), [Span(engine.cache(), len(ids), None)]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({}, {}),  # heads of 4 to 12 channels, groups of 3 to 4
        ({"num_key_value_heads": 6}, {"kv_heads": 8}),  # no groups on either side
        ({"num_key_value_heads": 1}, {"heads": 12, "kv_heads": 12}),  # one key head copied to six
        ({"num_key_value_heads": 3}, {"heads": 6, "kv_heads": 3, "hidden": 120}),  # heads of 20
        ({"head_dim": 6, "num_attention_heads": 4}, {"hidden": 48, "layers": 2, "inner": 44}),  # heads and layers unchanged
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}}, {}),
        ({}, {"vocabulary": 61}),
        ({}, {"hidden": 24, "heads": 6, "vocabulary": 61}),  # only layers and inner units
    ],
)
def test_logits_equal_those_of_the_small_model(tmp_path: Path, small: dict[str, Any], large: dict[str, int], tied: bool) -> None:
    source, model = tiny(tmp_path / "small", tie_word_embeddings=tied, **small)
    wide = widen(source, tmp_path / "wide", asked := size(**large))
    ids = torch.randint(61, (33,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        theirs = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)(ids[None]).logits[0]
    engine = load_engine(wide, "fp32")
    ours = logits(engine, ids)
    assert ours.shape == theirs.shape == (33, asked.vocabulary) and engine.shape.layers == asked.layers
    for found in (ours, theirs):
        torch.testing.assert_close(found[:, :61], expected, atol=1e-4, rtol=0)
        assert found.softmax(-1)[:, 61:].sum() < 1e-6  # new tokens are never drawn


def test_every_tensor_has_the_large_shape(tmp_path: Path) -> None:
    source, _ = tiny(tmp_path / "small", tie_word_embeddings=True)
    shapes = {n: tuple(t.shape) for n, t in load_file(widen(source, tmp_path / "wide", size()) / "model.safetensors").items()}
    same = LlamaConfig(
        vocab_size=83, hidden_size=96, intermediate_size=72, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    random = AutoModelForCausalLM.from_config(same).state_dict()
    assert shapes == {n: tuple(t.shape) for n, t in random.items() if n != "lm_head.weight"}


def test_an_exit_after_the_old_layers_is_exact_and_an_earlier_one_is_not(tmp_path: Path) -> None:
    wide = load_engine(widen(tiny(tmp_path / "small")[0], tmp_path / "wide", size()), "fp32")
    ids = torch.arange(1, 12)
    out = [torch.from_numpy(wide.decoder.forward(ids.numpy(), [Span(wide.cache(), 11, None)], layers=n)) for n in (1, 2, 5)]
    assert torch.equal(out[1], out[2]) and not torch.allclose(out[0], out[2], atol=1e-2)


def test_greedy_text_is_the_same_with_and_without_guesses(tmp_path: Path) -> None:
    small, _ = build(tmp_path / "small")
    wide = load_engine(widen(small.folder, tmp_path / "wide", size(hidden=288, heads=12, inner=100, vocabulary=150)), "fp32")
    for begin in range(5):
        prompt = [begin + 2, 7, 9 * begin + 3]
        expected = [p.token for p in Generation(small, prompt, max_new_tokens=30)]
        for speculation in (None, Speculation(EarlyExit(small.shape.layers), Adapt(fixed=3))):
            run = Generation(wide, prompt, max_new_tokens=30, speculation=speculation)
            assert [p.token for p in run] == expected
        assert run.report.acceptance == 1 or run.report.drafted == 0


def test_int8_rounds_as_in_the_small_model(tmp_path: Path) -> None:
    source, _ = tiny(tmp_path / "small", tie_word_embeddings=True)
    wide = widen(source, tmp_path / "wide", size())  # zeros are never a row's largest number
    ids = torch.arange(1, 20)
    few, many = logits(load_engine(source, "int8"), ids), logits(load_engine(wide, "int8"), ids)
    exact = logits(load_engine(source, "fp32"), ids)
    off = (few - exact).abs().mean()
    assert (many[:, :61] - exact).abs().mean() < 1.5 * off and many.softmax(-1)[:, 61:].sum() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packages_of_a_widened_model(tmp_path: Path, kind: str) -> None:
    """Groups of zeros stay zeros: a widened package has no larger error than the small model's."""
    small, _ = build(tmp_path / "small")
    wide = widen(small.folder, tmp_path / "wide", size(hidden=288, heads=12, inner=100, vocabulary=150))
    ids = torch.arange(2, 30)
    expected = logits(load_engine(small.folder, "fp32"), ids)
    off = (logits(load_engine(package(small.folder, kind)), ids) - expected).abs().mean()
    actual = logits(load_engine(package(wide, kind)), ids)
    assert (actual[:, : expected.shape[1]] - expected).abs().mean() < 1.5 * off and actual.softmax(-1)[:, expected.shape[1] :].sum() < 1e-6


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["stories260k", "babyllama_tok105"])
@pytest.mark.parametrize("large", ["tiny", "125m"])
def test_real_weights(name: str, large: str, tmp_path: Path) -> None:
    source = DATA / "models" / name / "hf"
    hidden, layers, heads, kv_heads, inner = SIZES[large]
    wide = widen(
        source, tmp_path, Size(hidden=hidden, layers=max(layers, 5), heads=heads, kv_heads=kv_heads, inner=inner, vocabulary=VOCABULARY)
    )
    small, engine = load_engine(source, "fp32"), load_engine(wide, "fp32")
    ids = torch.tensor(small.text.encode("Once upon a time, there was a little girl named Lily. She had a red ball."))
    expected, actual = logits(small, ids), logits(engine, ids)
    torch.testing.assert_close(actual[:, : expected.shape[1]], expected, atol=1e-4, rtol=0)
    assert actual.softmax(-1)[:, expected.shape[1] :].sum() < 1e-9
    texts = [[p.token for p in Generation(e, ids.tolist(), max_new_tokens=100)] for e in (small, engine)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("small", "large", "message"),
    [
        ({}, {"hidden": 24, "heads": 6}, "hidden=24 is too small .* at least 25"),  # no channel is left for the constant
        ({}, {"layers": 1}, "layers=1 is too small"),
        ({}, {"inner": 43}, "inner=43"),
        ({}, {"vocabulary": 60}, "vocabulary=60"),
        ({}, {"heads": 16}, "not a multiple of the 4"),
        ({}, {"hidden": 100}, "not a multiple"),
        ({}, {"hidden": 32, "heads": 4}, "4 heads are too few for the 6"),
        ({"attention_bias": True}, {}, "without biases"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "dynamic or YaRN"),
    ],
)
def test_models_that_cannot_be_widened_are_refused(tmp_path: Path, small: dict[str, Any], large: dict[str, int], message: str) -> None:
    source, _ = tiny(tmp_path / "small", **small)
    with pytest.raises(ModelError, match=message):
        widen(source, tmp_path / "wide", size(**large))


def test_key_heads_grow_until_the_old_ones_fit(tmp_path: Path) -> None:
    source, _ = tiny(tmp_path / "small", num_key_value_heads=6)
    wide = widen(source, tmp_path / "wide", size(hidden=112, heads=14))
    assert json.loads((wide / "config.json").read_text())["num_key_value_heads"] == 7  # 2 were asked for; 7 is the next that divides 14

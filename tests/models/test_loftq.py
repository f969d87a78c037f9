"""LoftQ: the initial adapter is the best approximation of the quantization error of its rank."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedtune.config import Config, DeviceClass, DevicesConfig, ModelConfig, PeftConfig, check
from fedtune.errors import ConfigError, ModelError
from fedtune.experiment import simulate
from fedtune.models import LiveAdapter, initial_adapter, load_backbone, loftq
from fedtune.rounds.find_strategy import make_strategy
from tests.models.build import checkpoint, hub, llama_config
from tests.models.test_quantize import KINDS, LM, cache, linears, logits, quantize, quantized_backbone, relative_error, wide  # noqa: F401  cache: a fixture
from tests.quick import quick
from tests.tiny import tiny_config

PEFT = PeftConfig(rank=5, alpha=20.0, init="loftq", rank_pattern={"down_proj": 3, "v_proj": 2})


def start(folder: Path, precision: str, peft: PeftConfig, **changes: Any) -> Any:
    return initial_adapter(hub(folder, precision=precision, compute="fp32", **changes), LM, peft, num_labels=0, seed=5)


def matrices(folder: Path, precision: str, **changes: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → W and Q(W), (out, in) float64, of what is quantized."""
    own = linears(load_backbone(hub(folder, **changes), LM, seed=5).model)
    coarse = linears(load_backbone(hub(folder, precision=precision, compute="fp32", **changes), LM, seed=5).model)
    out = {}
    for name, layer in coarse.items():
        if quantize.is_quantized(layer):
            weight = own[name].weight.double()
            out[name] = (weight.T if isinstance(own[name], Conv1D) else weight, quantize.weight_of(layer).double())
    return out


def check_start(folder: Path, precision: str, peft: PeftConfig = PEFT, **changes: Any) -> None:
    state = start(folder, precision, peft, **changes)
    result = matrices(folder, precision, **changes)
    assert result.keys() == set(state.spec.ranks)
    for name, (weight, coarse) in result.items():
        a, b, rank = state[f"{name}.lora_A"].double(), state[f"{name}.lora_B"].double(), state.spec.ranks[name]
        sigma = torch.linalg.svdvals(weight - coarse)
        left = (weight - coarse - state.spec.scaling[name] * b @ a).norm()
        # Eckart-Young: no matrix of that rank has an error below the root of the sum of the other squared singular values
        torch.testing.assert_close(left, sigma[rank:].square().sum().sqrt(), rtol=1e-5, atol=0)
        assert left < sigma.norm()
        torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-5, atol=0)  # each factor has √σ of every direction


@pytest.mark.parametrize("precision", quick(KINDS, "nf4"))
@pytest.mark.parametrize("kind", quick(["llama", "gpt2"], "gpt2"))
def test_the_error_is_the_tail_of_the_singular_values(tmp_path: Path, kind: str, precision: str) -> None:
    pattern = {"llama": PEFT.rank_pattern, "gpt2": {"c_fc": 2, "h.1.mlp.c_proj": 3}}[kind]
    for method in ("lora", "rslora"):
        check_start(wide(tmp_path / method, kind), precision, dataclasses.replace(PEFT, method=method, rank_pattern=pattern))


def test_the_start_of_a_random_backbone(tmp_path: Path) -> None:
    check_start(wide(tmp_path / "m"), "nf4", init="random")


@pytest.mark.parametrize("wrong", ["transpose", "scaling"])
def test_a_wrong_initialization_is_detected(tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "transpose":
        monkeypatch.setattr(loftq, "Conv1D", ())  # so that no layer counts as Conv1D
    else:
        good = loftq.factors
        monkeypatch.setattr(loftq, "factors", lambda residual, drawn, scaling: good(residual, drawn, 1.0))
    with pytest.raises((AssertionError, ModelError)):
        check_start(wide(tmp_path / "m", "gpt2"), "nf4", dataclasses.replace(PEFT, rank_pattern={}))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_directions_without_a_residual_keep_their_random_values(shape: tuple[int, int]) -> None:
    # R = 6·e_2 e_1ᵀ has one direction, s = 1.5: B·A = 4 there, √4 = 2 in each factor
    residual = torch.zeros(shape, dtype=torch.float64)
    residual[2, 1] = -6.0
    drawn = torch.randn(3, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = loftq.factors(residual, drawn, 1.5)
    assert sorted((abs(float(a[0, 1])), abs(float(b[2, 0])))) == [2.0, 2.0]
    assert torch.allclose(1.5 * b @ a, residual) and torch.equal(a[1:], drawn[1:]) and not b[:, 1:].any()
    nothing = loftq.factors(torch.zeros(shape, dtype=torch.float64), drawn, 1.5)
    assert torch.equal(nothing[0], drawn) and not nothing[1].any()


@pytest.mark.parametrize("precision", quick(KINDS, "nf4"))
def test_the_initialization_is_closer_to_the_full_model(tmp_path: Path, precision: str) -> None:
    folder = wide(tmp_path / "m")
    exact, backbone = logits(load_backbone(hub(folder), LM)), quantized_backbone(folder, precision)
    plain = relative_error(logits(backbone), exact)
    peft = PeftConfig(rank=24, init="loftq")
    live = LiveAdapter(backbone, peft, LM)
    live.load(start(folder, precision, peft))
    assert relative_error(logits(backbone), exact) < 0.8 * plain


def test_unquantized_layers_have_the_default_initialization(tmp_path: Path) -> None:
    folder = wide(tmp_path / "m", intermediate_size=172)  # down_proj's row length is not a multiple of the block
    state, drawn = start(folder, "nf4", PEFT), start(folder, "nf4", dataclasses.replace(PEFT, init="default"))
    for name in state.spec.ranks:
        whole = name.endswith("down_proj")
        assert torch.equal(state[f"{name}.lora_A"], drawn[f"{name}.lora_A"]) is whole
        assert bool(state[f"{name}.lora_B"].any()) is not whole
    with pytest.raises(ModelError, match="none of the adapted layers is quantized"):
        start(folder, "nf4", PeftConfig(targets="down_proj", init="loftq"))


@pytest.mark.slow
def test_the_start_depends_only_on_the_config(tmp_path: Path) -> None:
    folder = wide(tmp_path / "m")
    one, two = start(folder, "nf4", PEFT), start(folder, "nf4", PEFT)
    assert all(torch.equal(t, two[n]) for n, t in one.tensors.items())


BAD = {
    "method": ({"method": "dora"}, {}, "initializes LoRA factors, which peft.method=dora does not have"),
    "precision": ({}, {"precision": "bf16"}, "needs a quantized backbone, but model.precision=bf16"),
    "compute": ({}, {"compute": "auto"}, "needs the same model.compute on every machine"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_settings_are_refused_before_anything_is_loaded(case: str) -> None:
    peft, model, words = BAD[case]
    config = Config(peft=PeftConfig(**{"init": "loftq", **peft}), model=ModelConfig(**{"precision": "nf4", "compute": "fp32", **model}))
    with pytest.raises(ConfigError, match=words):
        check(config)
    check(dataclasses.replace(config, peft=PeftConfig()))


def test_mixed_devices_are_refused() -> None:
    config = Config(peft=PeftConfig(init="loftq"), model=ModelConfig(precision="nf4", compute="fp32"))
    check(config)
    with pytest.raises(ConfigError, match="fits one precision, .*: set devices=none"):
        check(dataclasses.replace(config, devices=DevicesConfig(classes={"phone": DeviceClass()})))


@pytest.mark.parametrize("name", ["fedsa.FedSA", "hetlora.HetLoRA"])
def test_strategies_that_assume_zero_init_refuse_loftq(name: str) -> None:
    config = Config(
        peft=PeftConfig(init="loftq"),
        model=ModelConfig(precision="nf4", compute="fp32"),
        strategy={"_target_": f"fedtune.strategies.{name}"},
    )
    with pytest.raises(ConfigError, match="assumes B·A = 0 before round 1"):
        make_strategy(config)
    make_strategy(dataclasses.replace(config, peft=PeftConfig()))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg.FedAvg", "flora.FLoRA", "ffa.FFA"])
def test_a_federated_run(tmp_path: Path, strategy: str) -> None:
    config = tiny_config(tmp_path)
    folder = checkpoint(tmp_path / "wide", config=llama_config(hidden_size=64, intermediate_size=128, head_dim=32, vocab_size=1024))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "model" / name).read_bytes())
    config.model = ModelConfig(source="hub", name=str(folder), device="cpu", precision="nf4", compute="fp32")
    config.peft, config.strategy = PeftConfig(rank=2, init="loftq"), {"_target_": f"fedtune.strategies.{strategy}"}
    config.inference = dataclasses.replace(config.inference, export="hf")
    run = simulate(check(config))
    assert (run / "adapter" / "quantised.json").is_file() and (run / "merged" / "config.json").is_file()

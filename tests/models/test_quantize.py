"""Quantized frozen backbones: quantized layers, the cache on disk, and training through them."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtune.config import METHODS, ModelConfig, PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import ModelError
from fedtune.models import Backbone, LiveAdapter, load_backbone, loss_sum
from fedtune.simulations.engines.batched import way_of
from tests.models.build import CONFIGS, ENCODERS, checkpoint, hub, token_ids
from tests.quick import quick

quantize = pytest.importorskip("fedtune.models.quantize", exc_type=ImportError)
CPU = torch.device("cpu")
LM = TaskConfig(kind="causal_lm", max_length=16)
CLASSES = TaskConfig(kind="classification", max_length=16)
KINDS = [
    pytest.param(p, marks=pytest.mark.skipif(bool(why), reason=f"no {p} kernel here: {why}"))
    for p in quantize.KINDS
    if (why := quantize._why_not(p, torch.float32, CPU)) is not None
]
PACKS = cast(bool, torch.cpu._is_avx512_bf16_supported())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "fedtune" / "quantised"


def quantized_backbone(folder: Path, precision: str = "nf4", task: TaskConfig = LM, *, compute: str = "fp32", **changes: Any) -> Backbone:
    return load_backbone(hub(folder, precision=precision, compute=compute, **changes), task, num_labels=3)


WIDE = {  # rows of whole blocks of 64
    "gpt2": {"n_embd": 64},
    "distilbert": {"dim": 64, "hidden_dim": 128},
    "opt": {"hidden_size": 64, "ffn_dim": 128},
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 32},
    **dict.fromkeys(("bert", "roberta", "albert"), {"hidden_size": 64, "intermediate_size": 128}),
    **dict.fromkeys(("llama", "qwen2", "qwen3"), {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}),
}


def wide(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    config = CONFIGS[kind]()
    config.update({**WIDE[kind], **changes})
    return checkpoint(folder, kind, config=config)


def task_of(kind: str) -> TaskConfig:
    return CLASSES if kind in ENCODERS else TaskConfig(kind="instruction", max_length=16, generate=False)


def logits(backbone: Backbone, seed: int = 1) -> Tensor:
    ids = token_ids(seed=seed)
    more = {"decoder_input_ids": ids} if backbone.seq2seq else {}
    with torch.no_grad():
        return backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits.float()


def linears(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def dequantized_backbone(backbone: Backbone, folder: Path, task: TaskConfig = LM) -> Backbone:
    """The float32 backbone with the dequantized weights."""
    plain = load_backbone(hub(folder), task, num_labels=3)
    own = linears(plain.model)
    with torch.no_grad():
        for name, layer in linears(backbone.model).items():
            if quantize.is_quantized(layer):
                weight = quantize.weight_of(layer)
                own[name].weight.copy_(weight.T if isinstance(own[name], Conv1D) else weight)
    return plain


def random_state(live: LiveAdapter) -> AdapterState:
    drawn = torch.Generator().manual_seed(3)
    state = live.read(version=0)
    return state.replace({n: t + 0.05 * torch.randn(t.shape, generator=drawn) for n, t in state.tensors.items()})


def gradients(live: LiveAdapter, task: TaskConfig = LM) -> dict[str, Tensor]:
    ids = token_ids()
    labels = torch.tensor([0, 1, 2]) if task.kind == "classification" else ids
    live.model.train()
    loss, _ = loss_sum(live.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}, task)
    loss.backward()
    out = {n: cast(Tensor, p.grad).clone() for n, p in live.parameters.items()}
    live.model.zero_grad()
    return out


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    size = max(float(t.norm()) for t in b.values())
    return max(float((a[n] - b[n]).norm()) for n in b) / size


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("kind", quick(CONFIGS, "llama", "gpt2", "albert", "t5"))
def test_every_architecture(tmp_path: Path, kind: str, precision: str) -> None:
    folder, task = wide(tmp_path / kind, kind), task_of(kind)
    plain, backbone = load_backbone(hub(folder), task, num_labels=3), quantized_backbone(folder, precision, task)
    own, result = linears(plain.model), linears(backbone.model)
    assert result.keys() == own.keys()
    whole = {n for n, m in result.items() if not quantize.is_quantized(m)}
    # not quantized: classifiers, the output layer, T5's wo (its code reads the weight's dtype), and layers that read an embedding of 8
    also = (".wo", *((".project_in", ".embedding_hidden_mapping_in") if precision == "nf4" else ()))
    heads = {n for n in own if n.split(".")[0] in ("classifier", "pre_classifier", "lm_head")}
    assert whole == heads | {n for n in own if n.endswith(also)}
    for name in result.keys() - whole:
        weight = own[name].weight.T if isinstance(own[name], Conv1D) else own[name].weight
        assert relative_error(quantize.weight_of(result[name]), weight) < (0.15 if precision == "nf4" else 0.02), name
    assert not any(p.requires_grad or p.is_meta for p in backbone.model.parameters())
    assert relative_error(logits(backbone), logits(dequantized_backbone(backbone, folder, task))) < 1e-4
    assert backbone.fingerprint == plain.fingerprint  # so adapters fit backbones of any precision


def test_rows_that_are_not_a_multiple_of_a_block_are_not_quantized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = wide(tmp_path / "llama", intermediate_size=172)
    with caplog.at_level(logging.WARNING):
        backbone = quantized_backbone(folder)
    assert "2 of 14 linear layers are not quantized, such as 'model.layers.0.mlp.down_proj': its row length of 172" in caplog.text
    assert relative_error(logits(backbone), logits(dequantized_backbone(backbone, folder))) < 1e-4
    with pytest.raises(ModelError, match=r"no layer of this backbone has a row length that is a multiple of 64 .*: take int8 or bf16"):
        quantized_backbone(checkpoint(tmp_path / "small"))


@pytest.mark.parametrize("precision", KINDS)
def test_the_second_start_reads_the_cache(tmp_path: Path, cache: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wide(tmp_path / "bert", "bert")
    first = logits(quantized_backbone(folder, precision, CLASSES))
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1 and not list(cache.glob(".new-*"))
    monkeypatch.setattr(quantize, "_build", None)
    assert torch.equal(
        logits(quantized_backbone(folder, precision, CLASSES)), first
    )  # heads are not in the cache: they are drawn from the seed again


def test_each_setting_has_its_own_entry(tmp_path: Path, cache: Path) -> None:
    folder = wide(tmp_path / "llama")
    quantized_backbone(folder)
    quantized_backbone(folder, compute="bf16")
    quantized_backbone(folder, init="random")
    quantized_backbone(wide(tmp_path / "other", vocab_size=40))
    quantized_backbone(folder, task=CLASSES)
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 5


@pytest.mark.parametrize("how", ["truncated", "changed", "no mark"])
def test_a_damaged_cache_entry_is_rebuilt(tmp_path: Path, cache: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = wide(tmp_path / "llama")
    first = logits(quantized_backbone(folder))
    [entry] = [p for p in cache.iterdir() if p.is_dir()]
    file = entry / "model.safetensors"
    raw = bytearray(file.read_bytes())
    if how == "no mark":
        (entry / "fedtune.json").unlink()
    elif how == "truncated":
        file.write_bytes(raw[:-7])
    else:
        raw[-1] ^= 1
        file.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(quantized_backbone(folder)), first)
    assert "cannot be used" in caplog.text and "it is quantized again" in caplog.text
    caplog.clear()
    quantized_backbone(folder)
    assert not caplog.text


def test_a_missing_cache_folder_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wide(tmp_path / "llama")
    first = logits(quantized_backbone(folder))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(quantized_backbone(folder)), first)
    assert "every start quantizes it again" in caplog.text


@pytest.mark.parametrize("method", quick([m for m in METHODS if m not in ("full", "bitfit")], "lora", "dora", "prompt"))
@pytest.mark.parametrize("precision", KINDS)
def test_every_method_trains_as_over_the_dequantized_weights(tmp_path: Path, precision: str, method: str) -> None:
    folder = wide(tmp_path / "llama")
    backbone, peft = quantized_backbone(folder, precision), PeftConfig(method=method, rank=3, tokens=4, bottleneck=5)
    plain = dequantized_backbone(backbone, folder)
    one, two = LiveAdapter(backbone, peft, LM), LiveAdapter(plain, peft, LM)
    state = random_state(one)
    one.load(state)
    two.load(state)
    assert worst(gradients(one), gradients(two)) < 1e-4


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("kind", quick(["gpt2", "bert", "opt"], "opt"))
def test_biases_and_heads_train_too(tmp_path: Path, precision: str, kind: str) -> None:
    folder, task = wide(tmp_path / kind, kind), CLASSES if kind in ENCODERS else LM
    for compute in ("fp32", "bf16"):
        backbone = quantized_backbone(folder, precision, task, compute=compute)
        plain = dequantized_backbone(backbone, folder, task)
        one, two = (LiveAdapter(b, PeftConfig(method="bitfit"), task) for b in (backbone, plain))
        state = random_state(one)
        one.load(state)
        two.load(state)
        assert worst(gradients(one, task), gradients(two, task)) < (1e-4 if compute == "fp32" else 0.1)


def test_full_fine_tuning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"peft.method=full trains the weights themselves.*take model.precision=fp32"):
        LiveAdapter(quantized_backbone(wide(tmp_path / "llama")), PeftConfig(method="full"), LM)


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("compute", quick(["fp32", "bf16"], "fp32"))
def test_an_evaluation_does_not_change_the_gradients(tmp_path: Path, precision: str, compute: str) -> None:
    live = LiveAdapter(quantized_backbone(wide(tmp_path / "llama"), precision, compute=compute), PeftConfig(rank=3), LM)
    live.load(random_state(live))
    before = gradients(live)
    live.model.eval()
    with torch.inference_mode():
        live.model(input_ids=token_ids())
    assert worst(gradients(live), before) == 0


@pytest.mark.skipif(not PACKS, reason="this CPU has no layout that a layer would pack itself into")
def test_the_packing_changes_gradients_without_steady(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The mutation: with the packing that `_steady` disables, the test above fails."""
    live = LiveAdapter(quantized_backbone(wide(tmp_path / "llama")), PeftConfig(), LM)
    live.load(random_state(live))
    before = gradients(live)
    for module in live.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = True
    live.model.eval()
    with torch.no_grad():
        live.model(input_ids=token_ids())
    assert worst(gradients(live), before) > 0.1


def test_a_missing_kernel_gives_a_one_sentence_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_why_not", lambda precision, *_: "no symbol" if precision == "nf4" else "")
    with pytest.raises(ModelError, match=r"^model.precision=nf4: .* this machine's cpu \(no symbol\); take model.precision=int8 or bf16$"):
        quantized_backbone(wide(tmp_path / "llama"))
    monkeypatch.setattr(quantize, "_why_not", lambda *_: "no symbol")
    with pytest.raises(ModelError, match=r"take model.precision=bf16$"):
        quantized_backbone(wide(tmp_path / "llama2"))


def test_missing_weights_are_refused_and_not_cached(tmp_path: Path, cache: Path) -> None:
    folder = wide(tmp_path / "llama")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"'model.layers.2.input_layernorm.weight' is missing from .* do not belong together"):
        quantized_backbone(folder)
    assert not [p for p in cache.iterdir() if p.is_dir()]


@pytest.mark.parametrize("precision", ["fp32", *KINDS])
def test_checkpointing_changes_no_gradient(tmp_path: Path, precision: str) -> None:
    folder = wide(tmp_path / "llama")
    states, results = [], []
    for on in (False, True):
        live = LiveAdapter(quantized_backbone(folder, precision, checkpointing=on), PeftConfig(rank=3), LM)
        states.append(random_state(live))
        live.load(states[0])
        results.append(gradients(live))
        assert any(getattr(m, "gradient_checkpointing", False) for m in live.model.modules()) is on
        assert (way_of(live, LM)[0] is None) is on
    assert worst(results[1], results[0]) < 1e-6


def test_an_adapter_moves_between_precisions(tmp_path: Path) -> None:
    folder = wide(tmp_path / "llama")
    states = []
    for precision in ("fp32", "bf16", "nf4", "int8"):
        config: ModelConfig = hub(folder, precision=precision)
        live = LiveAdapter(load_backbone(config, LM), PeftConfig(method="dora", rank=3), LM)
        if states:
            live.load(states[-1])
        states.append(random_state(live) if not states else live.read(version=0))
    for state in states[1:]:
        assert state.spec == states[0].spec
        assert all(torch.allclose(state[n], t, atol=1e-6) for n, t in states[0].tensors.items())

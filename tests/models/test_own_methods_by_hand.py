"""Bottleneck adapters, prompts per layer, biases and all weights, compared with results by hand; refused settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
)

from fedtune.config import PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import ModelError
from fedtune.models.backbone import quiet
from fedtune.models.merge import merge
from fedtune.models.methods import adapter, full, method, ptuning_v2
from fedtune.models.methods.ptuning_v2 import _Shift
from tests.models.test_own_methods import (
    ANSWERS,
    BIASES,
    CAUSAL,
    CLASSES,
    CONFIGS,
    DECODERS,
    ENCODERS,
    FULL,
    HOULSBY,
    PFEIFFER,
    PROMPTS,
    attach,
    batch,
    build,
    logits,
    shake,
)  # fmt: skip

# -- bottleneck adapters ----------------------------------------------------------------------------------------------------------------


def test_an_adapter_by_hand() -> None:
    live = attach(build("gpt2", CAUSAL), PFEIFFER, CAUSAL)
    shake(live)
    model, at = live.model, "transformer.h.1.mlp.c_proj"
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    down, up = (live.parameters[f"{at}.adapter_{p}.weight"] for p in ("down", "up"))
    db, ub = (live.parameters[f"{at}.adapter_{p}.bias"] for p in ("down", "up"))
    assert (down.shape, up.shape) == ((3, 16), (16, 3))
    y = x @ model.get_parameter(f"{at}.weight") + model.get_parameter(f"{at}.bias")
    torch.testing.assert_close(model.get_submodule(at)(x), y + nn.functional.gelu(y @ down.T + db) @ up.T + ub)


@pytest.mark.parametrize(("kind", "places"), [("llama", 4), ("gpt2", 4), ("opt", 4), ("bert", 4), ("distilbert", 4), ("albert", 2)])
def test_houlsby_adapts_attention_too_and_shared_layers_once(kind: str, places: int) -> None:
    task = CLASSES if kind in ENCODERS else CAUSAL
    for peft, count in ((HOULSBY, places), (PFEIFFER, places // 2)):
        names = [n for n in attach(build(kind, task), peft, task).parameters if n.endswith(".adapter_up.weight")]
        assert len(names) == count
    t5 = [n for n in attach(build("t5", ANSWERS), HOULSBY, ANSWERS).parameters if n.endswith(".adapter_up.weight")]
    assert len(t5) == 2 * 2 + 2 * 3  # the encoder's attention and feed-forward; the decoder's two attentions and feed-forward


def test_initial_values_of_adapters_have_the_stated_range() -> None:
    draw = torch.Generator().manual_seed(0)
    initial = method("adapter").initial("x.adapter_down.weight", (3, 16), PFEIFFER, draw, 0.02)
    assert 0.5 / 4 < initial.abs().max() <= 1 / 4  # kaiming_uniform(a=√5): U(±1/√16)
    assert not method("adapter").initial("x.adapter_up.weight", (16, 3), PFEIFFER, draw, 0.02).any()


# -- prompts per layer ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_is_seen_as_keys_and_values_by_hand(implementation: str) -> None:
    """One layer of ALBERT's attention, applied at depth 1, against softmax(q [P; K]ᵀ) [P; V]."""
    live = attach(build("albert", CLASSES), PROMPTS, CLASSES)
    shake(live)
    model: Any = live.model
    model.set_attn_implementation(implementation)
    attention = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
    attention.prompts.turn = 1
    given = mask if implementation == "sdpa" else torch.where(mask, 0.0, -1e9)
    actual = attention(x, given)[0]
    prompt = live.parameters["layers.1.prompt"]
    heads = lambda t: t.unflatten(-1, (4, 4)).transpose(-3, -2)  # noqa: E731
    q, k, v = heads(attention.query(x)), heads(attention.key(x)), heads(attention.value(x))
    k, v = (torch.cat([heads(p).expand(2, -1, -1, -1), t], 2) for p, t in zip(prompt, (k, v), strict=True))
    scores = q @ k.transpose(-1, -2) / 2 + torch.cat([torch.zeros(2, 1, 1, 3), torch.where(mask, 0.0, -1e9)], -1)
    mixed = attention.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(actual, attention.LayerNorm(x + mixed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS, "t5"])
def test_eager_and_sdpa_agree_with_prompts_and_padding_hides_nothing(kind: str) -> None:
    task = ANSWERS if kind == "t5" else CLASSES if kind in ENCODERS else CAUSAL
    live = attach(build(kind, task), PROMPTS, task)
    shake(live)
    want = logits(live.model, task, kind)
    cast_any: Any = live.model
    cast_any.set_attn_implementation("eager")
    torch.testing.assert_close(logits(live.model, task, kind), want, rtol=1e-4, atol=1e-4)
    with live.disabled():
        assert not torch.allclose(logits(live.model, task, kind), want, atol=1e-2)
    inputs = batch(task, kind)
    alone = live.model(**{k: v[2:, :3] if "decoder" not in k else v[2:] for k, v in inputs.items()}).logits
    together = live.model(**inputs).logits[2:]
    torch.testing.assert_close(together if alone.shape == together.shape else together[:, :3], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("task", [CAUSAL, CLASSES], ids=lambda t: t.kind)
def test_a_decoders_prompts_open_as_pefts_prefix_tuning(kind: str, task: TaskConfig, tmp_path: Path) -> None:
    live = attach(build(kind, task), PROMPTS, task)
    shake(live)
    assert live.save is not None
    live.save(tmp_path)
    with quiet():
        model = PeftModel.from_pretrained(build(kind, task), str(tmp_path)).eval()
    torch.testing.assert_close(logits(model, task), logits(live.model, task), rtol=1e-4, atol=1e-4)
    if task is CAUSAL:
        ids = batch(task)["input_ids"][:2, :5]
        inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]), "max_new_tokens": 4, "do_sample": False}
        a, b = (m.generate(**inputs) for m in (model, live.model))  # pyright: ignore[reportCallIssue]
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"


def test_swapped_keys_and_values_and_a_lost_residual_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations: the checks by hand above detect them."""
    real = ptuning_v2._LayerPrompts.next
    monkeypatch.setattr(ptuning_v2._LayerPrompts, "next", lambda self: real(self)[::-1])
    with pytest.raises(AssertionError):
        test_a_prompt_is_seen_as_keys_and_values_by_hand("sdpa")
    whole = adapter._Adapt.__call__
    monkeypatch.setattr(adapter._Adapt, "__call__", lambda self, module, args, y: whole(self, module, args, y) - y)
    with pytest.raises(AssertionError):
        test_an_adapter_by_hand()
    edits = full.edits
    monkeypatch.setattr(full, "edits", lambda state, sizes: edits(state.replace({n: -t for n, t in state.tensors.items()}), sizes))
    with pytest.raises(AssertionError):
        test_merged_weights_are_the_trained_ones("gpt2", FULL)


def test_without_the_shift_of_positions_the_outputs_differ_from_peft_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: without the shift the same check fails."""
    monkeypatch.setattr(_Shift, "__call__", lambda self, module, args, kwargs: (args, kwargs))
    for kind in ("llama", "gpt2", "opt"):
        with pytest.raises(AssertionError):
            test_a_decoders_prompts_open_as_pefts_prefix_tuning(kind, CAUSAL, tmp_path / kind)


@pytest.mark.parametrize("kind", [*ENCODERS, "t5"])
def test_encoders_have_no_peft_form(kind: str) -> None:
    assert attach(build(kind, CLASSES), PROMPTS, CLASSES).save is None


def test_each_layer_is_a_tensor_that_can_be_trained_alone() -> None:
    live = attach(build("albert", CLASSES), PROMPTS, CLASSES)
    assert [n for n in live.parameters if n.endswith("prompt")] == [f"layers.{i}.prompt" for i in range(3)]
    t5 = attach(build("t5", ANSWERS), PROMPTS, ANSWERS)
    assert list(t5.parameters) == [f"{s}.layers.{i}.prompt" for s in ("encoder", "decoder") for i in range(2)]
    for name, parameter in live.parameters.items():
        parameter.requires_grad_(name == "layers.1.prompt")
    logits(live.model, CLASSES).square().sum().backward()
    assert [n for n, p in live.parameters.items() if p.grad is not None] == ["layers.1.prompt"]
    want = logits(live.model, CLASSES)
    with torch.no_grad():
        live.parameters["layers.2.prompt"].add_(1.0)  # a frozen prompt has an effect too
    assert not torch.allclose(logits(live.model, CLASSES), want, atol=1e-3)


def test_each_depth_of_albert_has_its_own_prompt_also_with_groups() -> None:
    config = CONFIGS["albert"]()
    config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num, config.num_labels = 4, 2, 2, 3
    model = AutoModelForSequenceClassification.from_config(config)
    live = attach(model.requires_grad_(False).eval(), PROMPTS, CLASSES)
    seen = []
    for group in model.albert.encoder.albert_layer_groups:
        for layer in group.albert_layers:
            prompts = layer.attention.prompts
            layer.attention.register_forward_pre_hook(
                lambda m, a, p=prompts: seen.append(p.layers[p.turn % len(p.layers)])  # fmt: skip
            )
    logits(live.model, CLASSES)
    assert seen == list(range(8))
    model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.prompts.turn = 1  # as after an interrupted pass
    seen.clear()
    logits(live.model, CLASSES)
    assert seen == list(range(8))


def test_prompts_have_second_derivatives_under_eager_attention() -> None:
    live = attach(build("roberta", CLASSES), PROMPTS, CLASSES)
    model: Any = live.model
    model.set_attn_implementation("eager")
    prompts = [p for n, p in live.parameters.items() if n.endswith("prompt")]
    first = torch.autograd.grad(logits(model, CLASSES).log_softmax(-1)[:, 0].sum(), prompts, create_graph=True)
    second = torch.autograd.grad(torch.stack([g.sum() for g in first]).sum(), prompts)
    assert all(s.isfinite().all() and s.any() for s in second)


def test_prompts_do_not_change_the_models_config() -> None:
    model = build("llama", CAUSAL)
    config_json = model.config.to_json_string()
    attach(model, PROMPTS, CAUSAL)
    assert model.config.to_json_string() == config_json and model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="sdpa or eager attention, but the model has 'flash_attention_2'"):
        q = torch.zeros(1, 4, 2, 4)
        ptuning_v2._attend(model.get_submodule("model.layers.0.self_attn"), q, q, q, None)


# -- biases and all weights -------------------------------------------------------------------------------------------------------------


def test_bitfit_names_every_bias_and_the_head() -> None:
    live = attach(build("bert", CLASSES), BIASES, CLASSES)
    own = [n for n, _ in build("bert", CLASSES).named_parameters()]
    assert set(live.parameters) == {n for n in own if n.endswith("bias")} | {"classifier.weight"}
    assert set(live.origin) == set(live.parameters) - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(live.origin[n], live.parameters[n]) for n in live.origin)


def test_full_trains_tied_and_shared_weights_once() -> None:
    live = attach(build("llama", CAUSAL), FULL, CAUSAL)
    assert "lm_head.weight" not in live.parameters and "model.embed_tokens.weight" in live.parameters
    albert = attach(build("albert", CLASSES), FULL, CLASSES)
    assert sum("attention.query.weight" in n for n in albert.parameters) == 1
    assert "classifier.weight" in albert.parameters and "classifier.weight" not in albert.origin


@pytest.mark.parametrize(("kind", "peft"), [("gpt2", BIASES), ("gpt2", FULL), ("llama", FULL), ("albert", FULL)])
def test_merged_weights_are_the_trained_ones(kind: str, peft: PeftConfig) -> None:
    task = CLASSES if kind == "albert" else CAUSAL
    live, bare = attach(build(kind, task), peft, task), build(kind, task)
    for i, (name, parameter) in enumerate(live.parameters.items()):
        if name in live.origin:
            with torch.no_grad():
                parameter += 0.01 * (i + 1)
    delta = AdapterState({n: (live.parameters[n] - o).detach() for n, o in live.origin.items()}, AdapterSpec(method=peft.method))
    merge(bare, delta)
    torch.testing.assert_close(logits(bare, task), logits(live.model, task), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="'nowhere.bias' .* is not in the backbone"):
        merge(bare, delta.replace({"nowhere.bias": torch.zeros(2)}))


# -- refused settings -------------------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_gives_a_one_sentence_error() -> None:
    with quiet():
        model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    for peft, words in (
        (HOULSBY, "=adapter does not support the architecture 'bloom'"),
        (PROMPTS, "=ptuning_v2 does not support the architecture 'bloom'"),
    ):
        with pytest.raises(ModelError, match=words) as bad:
            attach(model, peft, CAUSAL)
        assert "\n" not in str(bad.value)


def test_too_many_prompt_tokens_and_non_float32_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="peft.tokens=60 with task.max_length=16 is more than the model's context of 64 tokens"):
        attach(build("gpt2", CAUSAL), PeftConfig(method="ptuning_v2", tokens=60), CAUSAL)
    with pytest.raises(ModelError, match="loses small steps in bfloat16.* take model.precision=fp32"):
        attach(build("gpt2", CAUSAL, dtype=torch.bfloat16), FULL, CAUSAL)

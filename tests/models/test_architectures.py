"""Backbones that the other tests do not cover: composite configs, experts, and architectures that do not suit the task."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText

import fedtune
from fedtune.clients.devices.estimate import shapes_of
from fedtune.config import Config, PeftConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models import LiveAdapter, initial_adapter, load_backbone
from fedtune.models.backbone import quiet
from fedtune.models.checkpoint import stored_tensors
from fedtune.models.losses import loss_sum
from fedtune.models.methods import attach
from fedtune.models.probe import TESTED, probe
from tests.models.build import CONFIGS, VOCABULARY, checkpoint, hub, token_ids, tokenizer
from tests.quick import quick

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=16), TaskConfig(kind="classification", max_length=16)
WRITES = TaskConfig(kind="instruction", max_length=16, max_new_tokens=4)
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
T: Any = transformers


def gemma3() -> Any:
    """Its pad token, vocabulary and width are its text config's."""
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return T.Gemma3Config(text_config={**BASE, "head_dim": 4, "sliding_window": 8}, vision_config=vision)


def qwen3_5() -> Any:
    text = {
        **BASE, "num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    return T.Qwen3_5Config(text_config=text, vision_config=vision)


def qwen3_moe() -> Any:
    """Its first layer is dense, its second has experts."""
    return T.Qwen3MoeConfig(**BASE, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0], head_dim=4)


def glm4_moe() -> Any:
    return T.Glm4MoeConfig(**BASE, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, head_dim=4)


def deepseek_v3() -> Any:
    return T.DeepseekV3Config(
        **{**BASE, "num_key_value_heads": 4}, moe_intermediate_size=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4,
    )  # fmt: skip


def mixtral(**changes: Any) -> Any:
    return T.MixtralConfig(**{**BASE, **changes}, num_local_experts=4)


def gpt_oss() -> Any:
    return T.GptOssConfig(**BASE, num_local_experts=4, num_experts_per_tok=2, head_dim=4, sliding_window=8)


def llama4() -> Any:
    """Its router is a linear layer that returns two tensors."""
    return T.Llama4TextConfig(**BASE, intermediate_size_mlp=24, num_local_experts=2, head_dim=4)


def mamba() -> Any:
    return T.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )


def xlnet() -> Any:
    """It classifies at the last position, padding or not, and its language model reads in both directions."""
    return T.XLNetConfig(
        vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24, dropout=0.0, summary_last_dropout=0.0, initializer_range=0.3,
        pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def composite(folder: Path, config: Any) -> Path:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def live(folder: Path, task: TaskConfig, peft: PeftConfig | None = None) -> LiveAdapter:
    return LiveAdapter(load_backbone(hub(folder), task, num_labels=3), peft or PeftConfig(rank=2), task)


@pytest.mark.parametrize("config", [gemma3, qwen3_5])
@pytest.mark.parametrize("task", quick([CAUSAL, CLASSES, WRITES], CLASSES), ids=lambda t: t.kind)
@pytest.mark.parametrize("method", quick(["lora", "ia3", "full"], "lora"))
def test_a_composite_model_trains_its_text_part(tmp_path: Path, config: Callable[[], Any], task: TaskConfig, method: str) -> None:
    folder, peft = composite(tmp_path / "m", config()), PeftConfig(method=method, rank=2)
    slot = live(folder, task, peft)
    probe(slot, task)  # every trained tensor has a gradient, so none of them is in the vision tower
    slot.load(initial_adapter(hub(folder), task, peft, num_labels=3, seed=0))
    assert all("vis" not in n for n in slot.parameters)
    assert all(p.grad is None for p in slot.parameters.values())
    shapes = shapes_of(Config(model=hub(folder), task=task, peft=peft), 3)
    assert shapes.hidden == 16 and shapes.logits == (3 if task is CLASSES else VOCABULARY)


@pytest.mark.parametrize("config", [gemma3, qwen3_5])
def test_a_composite_model_is_built_without_weights_and_quantized_on_loading(
    tmp_path: Path, config: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = composite(tmp_path / "m", config())
    kind = type(load_backbone(hub(folder), CAUSAL).model)
    outline = {t.name: torch.empty(t.shape, device="meta") for t in stored_tensors(folder)}
    assert type(load_backbone(hub(folder), CAUSAL, outline=outline).model) is kind
    assert type(load_backbone(hub(folder, precision="int8", compute="fp32"), CAUSAL).model) is kind


def test_no_source_asks_a_composite_config_for_its_text_values() -> None:
    root = Path(str(fedtune.__file__)).parents[1]
    values = "pad_token_id|eos_token_id|vocab_size|hidden_size|max_position_embeddings|initializer_range"
    direct = re.compile(rf"""model\.config(\.|, ")({values})\b""")
    files = [p for part in ("fedtune", "clients", "simulations") for p in (root / part).rglob("*.py")]
    assert len(files) > 100 and direct.search("teacher.model.config.vocab_size") and direct.search('getattr(model.config, "pad_token_id")')
    assert [f"{p.name}: {m[0]}" for p in files for m in direct.finditer(p.read_text()) if "pretrain" not in p.name] == []


@pytest.mark.parametrize("config", [qwen3_moe, glm4_moe, deepseek_v3])
def test_targets_that_peft_renames_are_refused_with_those_that_work(tmp_path: Path, config: Callable[[], Any]) -> None:
    folder = checkpoint(tmp_path / "m", config=config())
    with pytest.raises(ModelError, match=r"PEFT does not adapt 'model.layers.0.mlp.down_proj'.*set peft.targets=\[.*o_proj\]$") as caught:
        live(folder, CAUSAL)
    with pytest.raises(ModelError, match=re.escape(str(caught.value))):  # the server finds this from config.json
        initial_adapter(hub(folder), CAUSAL, PeftConfig(rank=2), num_labels=0, seed=0)
    names = str(caught.value).partition("peft.targets=[")[2].removesuffix("]").split(",")
    slot = live(folder, CAUSAL, PeftConfig(rank=2, targets=names))
    probe(slot, CAUSAL)
    assert {n.split(".")[-2] for n in slot.parameters} == set(names)


@pytest.mark.parametrize("config", [mixtral, gpt_oss])
def test_frozen_experts_are_named(tmp_path: Path, config: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        live(checkpoint(tmp_path / "m", config=config()), CAUSAL)
    (line,) = [r.getMessage() for r in caplog.records if "all-linear" in r.getMessage()]
    assert "78 %" in line and "'model.layers.0.mlp.experts.gate_up_proj'" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        live(checkpoint(tmp_path / "l"), CAUSAL)
    assert not caplog.records


def test_unquantized_experts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wide = mixtral(hidden_size=64, intermediate_size=64)
    with caplog.at_level(logging.WARNING):
        load_backbone(hub(checkpoint(tmp_path / "m", config=wide), precision="nf4", compute="fp32"), CAUSAL)
    (line,) = [r.getMessage() for r in caplog.records if "not quantized" in r.getMessage()]
    assert "model.precision=nf4" in line and "experts" in line


def test_a_model_whose_code_fails_on_packed_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = checkpoint(tmp_path / "m", config=llama4())  # its code initializes packed weights as if they were floats
    with pytest.raises(ModelError, match=r"cannot be read back \(.*\): take model.precision=bf16 or fp32, or check the disk$") as caught:
        load_backbone(hub(folder, precision="int8", compute="fp32"), CAUSAL)
    assert "not implemented" in str(caught.value)


def test_a_router_is_not_a_target(tmp_path: Path) -> None:
    slot = live(checkpoint(tmp_path / "m", config=llama4()), CAUSAL)
    probe(slot, CAUSAL)
    assert not any("router" in n for n in slot.parameters)


def test_peft_s_errors_become_one_sentence_errors(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", config=mamba())
    for start in (
        lambda: live(folder, CAUSAL),
        lambda: initial_adapter(hub(folder), CAUSAL, PeftConfig(rank=2), num_labels=0, seed=0),
        lambda: shapes_of(Config(model=hub(folder), task=CAUSAL, peft=PeftConfig(rank=2))),
    ):
        with pytest.raises(ModelError, match=r"peft.targets=all-linear does not fit the architecture 'mamba': .*out_proj"):
            start()
    probe(live(folder, CAUSAL, PeftConfig(rank=2, targets=["in_proj", "x_proj"])), CAUSAL)


def test_a_model_s_errors_in_a_step_become_one_sentence_errors(tmp_path: Path) -> None:
    slot = live(checkpoint(tmp_path / "m", config=llama4()), CAUSAL)
    slot.backbone.model.register_forward_pre_hook(lambda module, args: {}["no such key"])
    with pytest.raises(ModelError, match=r"'llama4_text' with peft.method=lora .* cannot do a training step: 'no such key': name other"):
        probe(slot, CAUSAL)


@pytest.mark.parametrize(("task", "says"), [(CLASSES, "with its padding"), (CAUSAL, "with later tokens")], ids=["padding", "future"])
def test_a_model_that_reads_padding_or_later_tokens_is_refused(tmp_path: Path, task: TaskConfig, says: str) -> None:
    with pytest.raises(ModelError, match=f"'xlnet' with peft.method=lora and task.kind={task.kind}: .*{says}"):
        probe(live(checkpoint(tmp_path / "m", config=xlnet()), task), task)


@pytest.mark.parametrize(
    ("config", "task", "method", "advice"),
    [
        (xlnet, CLASSES, "full", "trainable tensors\\): take peft=lora$"),  # this method has no peft.targets
        (xlnet, CLASSES, "lora", "take another backbone or another task.kind$"),
        (gemma3, WRITES, "prompt", "take another backbone, another task.kind or peft=lora$"),  # the padding follows virtual tokens
    ],
)
def test_a_refusal_suggests_settings_of_the_method(
    tmp_path: Path, config: Callable[[], Any], task: TaskConfig, method: str, advice: str
) -> None:
    folder = composite(tmp_path / "m", config()) if config is gemma3 else checkpoint(tmp_path / "m", config=config())
    with pytest.raises(ModelError, match=advice):
        probe(live(folder, task, PeftConfig(method=method, tokens=3)), task)


def test_a_tensor_without_a_gradient_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = live(checkpoint(tmp_path / "m", config=llama4()), CAUSAL)
    idle = nn.Parameter(torch.ones(2))
    monkeypatch.setattr(slot, "parameters", {**slot.parameters, "tower.lora_A": idle})
    with pytest.raises(ModelError, match=r"no gradient reaches 'tower.lora_A' \(1 of 29 trainable tensors\)"):
        probe(slot, CAUSAL)


def test_the_probe_does_not_change_the_adapter_or_the_generator(tmp_path: Path) -> None:
    slot = live(checkpoint(tmp_path / "m", config=mixtral()), CAUSAL)
    before, drawn, modes = slot.read(0), torch.get_rng_state(), [m.training for m in slot.model.modules()]
    probe(slot, CAUSAL)
    after = slot.read(0)
    assert all(torch.equal(before[n], after[n]) for n in before.tensors) and torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in slot.parameters.values()) and modes == [m.training for m in slot.model.modules()]


def test_architectures_without_a_probe_are_those_of_the_tests() -> None:
    assert {config().model_type for config in CONFIGS.values()} == TESTED


# -- checkpoints of other kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "text_config"], ids=["whole", "text part"])
@pytest.mark.parametrize("how", ["bitsandbytes", "gptq", "awq", "mxfp4"])
def test_a_quantized_checkpoint_is_refused_before_training(tmp_path: Path, place: str, how: str) -> None:
    folder = checkpoint(tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    packed = {"quantization_config": {"quant_method": how, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(raw | ({place: packed} if place else packed)))
    for start in (
        lambda: load_backbone(hub(folder), CAUSAL),
        lambda: initial_adapter(hub(folder), CAUSAL, PeftConfig(rank=2), num_labels=0, seed=0),
    ):
        with pytest.raises(ModelError, match=rf"is quantized already \({how}\): give the original checkpoint"):
            start()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_a_bert_model_without_a_pooler_loads_with_the_identity(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = CONFIGS["bert"]()
    config.hidden_size, config.intermediate_size = 64, 64
    with quiet(), torch.random.fork_rng():
        T.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    backbone = load_backbone(hub(tmp_path / "m", precision=precision, compute="fp32"), CLASSES, num_labels=3)
    pooler = backbone.model.get_submodule("bert.pooler.dense")
    assert torch.equal(pooler.get_parameter("weight").float(), torch.eye(64)) and not pooler.get_parameter("bias").any()
    slot = LiveAdapter(backbone, PeftConfig(rank=2), CLASSES)
    slot.load(initial_adapter(hub(tmp_path / "m", precision=precision, compute="fp32"), CLASSES, PeftConfig(rank=2), num_labels=3, seed=0))
    ids = token_ids()
    loss, _ = loss_sum(slot.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2])}, CLASSES)
    loss.backward()
    assert all(p.grad is not None for p in slot.parameters.values())


def test_other_missing_weights_are_still_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint(tmp_path / "m", "bert")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"'bert.encoder.layer.0.attention.self.query.weight' is missing from"):
        load_backbone(hub(folder), CLASSES, num_labels=3)


def test_attach_names_the_method_and_targets_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(hub(checkpoint(tmp_path / "m")), CAUSAL)

    def broken(*args: Any) -> Any:
        raise KeyError("some name")

    monkeypatch.setattr("fedtune.models.methods.lora.attach", broken)
    with pytest.raises(ModelError, match="peft.targets=all-linear does not fit the architecture 'llama': 'some name'"):
        attach(backbone.model, PeftConfig(rank=2), CAUSAL)

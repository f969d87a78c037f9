"""Folders for vLLM pass its checks, which `admit` copies from its source. Their weights give the logits of PEFT and transformers."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.cli.main import main
from fedtune.config import TaskConfig
from fedtune.errors import ModelError
from fedtune.export.vllm import describe_vllm, export_vllm
from fedtune.models.backbone import quiet
from tests.export.test_edge_architectures import folder_of
from tests.export.test_huggingface import ASK, CAUSAL, CLASSES, make_run
from tests.models.build import checkpoint, hub, llama_config, token_ids

CHAT = TaskConfig(kind="chat", max_length=32, max_new_tokens=6)
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # layers of Llama that vLLM can adapt


def admit(folder: Path, command: str) -> float:
    """Make vLLM's checks of a LoRA folder (peft_helper.py, lora_model.py, config/lora.py). Returns the scaling."""
    config = json.loads((folder / "adapter_config.json").read_text())
    r, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]  # required fields
    assert type(r) is int and type(alpha) is int and isinstance(targets, list) and all(re.fullmatch(r"\w+", t) for t in targets)
    assert not config.get("modules_to_save") and not config.get("use_dora") and config.get("bias", "none") == "none"
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")  # vLLM does not read them
    words = shlex.split(command)
    most = int(words[words.index("--max-lora-rank") + 1])
    assert most in (1, 8, 16, 32, 64, 128, 256, 320, 512) and r <= most and "--enable-lora" in words
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name).groups()  # type: ignore[union-attr]
        assert module.rpartition(".")[2] in LINEARS & set(targets) and tensor.shape[0 if part == "A" else 1] == r
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def command_of(out: Path) -> str:
    return re.findall(r"`(vllm serve .*?)`", describe_vllm(out))[0]


def test_a_lora_folder(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    out = export_vllm(run, tmp_path / "out", separate=True)
    assert command_of(out) == f"vllm serve {tmp_path / 'm'} --enable-lora --lora-modules run={out} --max-lora-rank 8"
    assert command_of(out).replace(str(out), ".") in (out / "README.md").read_text()
    assert admit(out, command_of(out)) == 1.0
    with quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), str(out))
    torch.testing.assert_close(model(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=1e-5)


def test_modules_with_different_ranks_and_scalings_get_one_of_each(tmp_path: Path) -> None:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)  # PEFT draws the factors
        base = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "m"))
        settings = LoraConfig(
            r=9, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.1.mlp.up_proj": 2},
            alpha_pattern={"q_proj": 3}, init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        want = get_peft_model(base, settings)
        want.save_pretrained(str(tmp_path / "adapter"))
        out = export_vllm(tmp_path / "adapter", tmp_path / "out", separate=True)
        assert admit(out, command_of(out)) == 1.0 and "--max-lora-rank 16" in command_of(out)
        tensors = load_file(out / "adapter_model.safetensors")
        origin = load_file(tmp_path / "adapter/adapter_model.safetensors")
        weights = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
        a, b = (tensors[weights.format(part)] for part in "AB")
        assert a.shape[0] == b.shape[1] == 9 and not a[2:].any() and not b[:, 2:].any()
        exact = origin[weights.format("B")] @ origin[weights.format("A")] * (6 / math.sqrt(2))  # alpha / √rank of this module
        torch.testing.assert_close(b @ a, exact, rtol=0, atol=1e-6)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), str(out))
    torch.testing.assert_close(model(token_ids()).logits, want(token_ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("separate", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_chat_names_its_template_and_end_tokens(tmp_path: Path, separate: bool) -> None:
    """The backbone has no template, so vLLM must get the one of the training."""
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CHAT)
    out = export_vllm(run, tmp_path / "out", separate=separate)
    command = command_of(out)
    chat = [{"role": "user", "content": "turn on"}]
    want = live.backbone.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert live.backbone.tokenizer.eos_token_id in json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    if separate:
        assert f"--chat-template {out}/chat_template.jinja --generation-config {out}" in command and admit(out, command) == 1.0
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
        template = (out / "chat_template.jinja").read_text()
        assert tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True) == want
    else:
        assert command == f"vllm serve {out} --served-model-name run"
        assert AutoTokenizer.from_pretrained(out).apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == want


SLOW = [pytest.param(method, dtype, marks=pytest.mark.slow) for method, dtype in (("dora", "float32"), ("ia3", "float16"))]


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), *SLOW])
def test_a_merged_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, dtype: str) -> None:
    folder = checkpoint(tmp_path / "m", config=llama_config(dtype=dtype))
    with quiet():
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    run, live = make_run(tmp_path / "run", hub(folder), ASK, method=method)
    assert main(["export", str(run), "--to", "vllm"]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()) == run / "vllm" and f"serve it with `vllm serve {run / 'vllm'} --served-model-name run`" in err
    config = json.loads((run / "vllm/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["torch_dtype"] == config["dtype"] == dtype
    assert "quantization_config" not in config
    assert json.loads((run / "vllm/generation_config.json").read_text())["eos_token_id"] in (1, [1])
    names = {
        "README.md",
        "config.json",
        "fedtune.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {p.name for p in (run / "vllm").iterdir()} == names
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(run / "vllm", dtype="float32")
    want = live.model(token_ids()).logits
    torch.testing.assert_close(model(token_ids()).logits, want, rtol=0, atol=1e-5 if dtype == "float32" else 0.05 * float(want.abs().max()))


REFUSED: list[tuple[str, TaskConfig, str, bool, str]] = [
    ("llama", CAUSAL, "prompt", False, "vLLM cannot run peft.method=prompt, which cannot be merged into weights: use --to hf"),
    ("llama", CAUSAL, "adapter", False, "vLLM cannot run peft.method=adapter"),
    ("llama", CLASSES, "lora", False, "is a classifier, and fedtune exports only models that generate text for vLLM: use --to hf"),
    ("t5", ASK, "lora", False, "does not run this encoder-decoder: use --to hf"),
    ("llama", CAUSAL, "dora", True, "only a plain LoRA adapter over the checkpoint's own weights can stay separate: leave out --separate"),
    ("llama", CAUSAL, "ia3", True, "leave out --separate"),
]


@pytest.mark.parametrize(("kind", "task", "method", "separate", "why"), REFUSED)
def test_models_that_vllm_does_not_run_are_refused(
    tmp_path: Path, kind: str, task: TaskConfig, method: str, separate: bool, why: str
) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", kind)), task, method=method)
    with pytest.raises(ModelError, match=why):
        export_vllm(run, tmp_path / "out", separate=separate)
    assert not (tmp_path / "out").exists()


def test_a_rank_beyond_vllms_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    monkeypatch.setattr("fedtune.export.vllm.RANKS", (1, 2))
    with pytest.raises(ModelError, match="has rank 3, and vLLM allows 2: leave out --separate"):
        export_vllm(run, tmp_path / "out", separate=True)


@pytest.mark.slow
def test_a_composite_models_layers_have_other_names(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(folder_of(tmp_path / "m", "gemma3_composite")), CAUSAL)
    with pytest.raises(ModelError, match="names the layers of this composite model in another way: leave out --separate"):
        export_vllm(run, tmp_path / "out", separate=True)
    export_vllm(run, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"]

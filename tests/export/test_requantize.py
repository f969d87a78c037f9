"""Exports of adapters trained over quantized weights: merged in 16 or 32 bits, or quantized again with a reported error."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.cli.main import main
from fedtune.config import Config, DataConfig, PeftConfig, TaskConfig, to_dict
from fedtune.errors import ModelError
from fedtune.export import export_hf
from fedtune.export.huggingface import describe_folder
from fedtune.export.requantize import describe_requantized, text_logits
from fedtune.inference import generate_text
from fedtune.models import LiveAdapter, initial_adapter, load_backbone
from fedtune.models.backbone import quiet
from tests.models.build import checkpoint, hub, llama_config
from tests.models.test_quantize import CLASSES, KINDS, LM, cache, dequantized_backbone, logits, quantize, random_state, relative_error, wide  # noqa: F401
from tests.quick import quick


def make_run(folder: Path, model: Path, precision: str = "nf4", task: TaskConfig = LM, **peft: Any) -> tuple[Path, LiveAdapter]:
    """The part of a run over a quantized backbone that the export reads, and its adapter."""
    chosen = PeftConfig(**{"rank": 3, **peft})
    config = hub(model, precision=precision, compute="fp32")
    live = LiveAdapter(load_backbone(config, task, num_labels=3, seed=5), chosen, task)
    if chosen.init == "loftq":
        live.load(initial_adapter(config, task, chosen, num_labels=3, seed=5))
    live.load(random_state(live))
    live.save_peft(folder / "adapter")
    live.read(1).save(folder / "adapter" / "fedtune.safetensors")
    stored = to_dict(Config(model=config, task=task, seed=5, peft=chosen, data=DataConfig(source="local", path="x")))
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    return folder, live


def exact_adapter(model: Path, live: LiveAdapter, task: TaskConfig = LM, **peft: Any) -> LiveAdapter:
    """The adapter with the checkpoint's unquantized weights."""
    out = LiveAdapter(load_backbone(hub(model), task, num_labels=3, seed=5), PeftConfig(**{"rank": 3, **peft}), task)
    out.load(live.read(1))
    return out


@pytest.mark.parametrize("precision", KINDS)
def test_the_default_is_the_checkpoint_and_the_adapter(tmp_path: Path, precision: str) -> None:
    model = wide(tmp_path / "m")
    run, live = make_run(tmp_path / "run", model, precision)
    out = export_hf(run, run / "merged")
    assert relative_error(logits(load_backbone(hub(out), LM)), logits(exact_adapter(model, live).backbone)) < 1e-5
    assert not describe_folder(out)


@pytest.mark.parametrize("kind", quick(["llama", "gpt2"], "gpt2"))
def test_a_loftq_adapter_is_merged_into_its_quantized_weights(tmp_path: Path, kind: str) -> None:
    model = wide(tmp_path / "m", kind)
    run, live = make_run(tmp_path / "run", model, init="loftq")
    folder = run / "adapter"
    for source, out in ((run, run / "merged"), (folder, tmp_path / "bare")):
        if source is folder:
            (folder / "fedtune.safetensors").unlink()
            (run / "config.yaml").unlink()
        merged = load_backbone(hub(export_hf(source, out)), LM)
        assert relative_error(logits(merged), logits(live.backbone)) < 1e-4
        assert "merged into the dequantized weights that it was trained on" in describe_folder(out)
        wrong = exact_adapter(model, live)  # with the residual added twice
        assert relative_error(logits(wrong.backbone), logits(live.backbone)) > 1e-2


def test_a_damaged_note_on_the_backbone_is_refused(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", wide(tmp_path / "m"), init="loftq")
    (run / "adapter" / "quantised.json").write_text('{"precision": "int3"}')
    with pytest.raises(ModelError, match="quantised.json cannot be read"):
        export_hf(run, tmp_path / "out")
    (run / "adapter" / "quantised.json").unlink()
    with pytest.raises(ModelError, match="quantised.json is missing"):
        export_hf(run, tmp_path / "out")


@pytest.mark.parametrize(("precision", "kind"), quick([("nf4", "llama"), ("int8", "llama"), ("nf4", "gpt2")], ("nf4", "gpt2")))
def test_the_reported_error_is_that_of_the_reloaded_model(tmp_path: Path, precision: str, kind: str) -> None:
    if why := quantize._why_not(precision, torch.float32, torch.device("cpu")):
        pytest.skip(f"no {precision} kernel here: {why}")
    model = wide(tmp_path / "m", kind)
    run, live = make_run(tmp_path / "run", model, precision)
    out = export_hf(run, tmp_path / "out", requantize=True)
    report = json.loads((out / "fedtune.json").read_text())["quantised"]
    assert {report["precision"], report["compute"]} == {precision, "fp32"}
    with quiet():
        reloaded_model = AutoModelForCausalLM.from_pretrained(out)
    layers = {n: m for n, m in reloaded_model.named_modules() if quantize.is_quantized(m)}
    want, plain = exact_adapter(model, live), load_backbone(hub(export_hf(run, tmp_path / "merged")), LM)
    own = dict(plain.model.named_modules())
    errors = {}
    for name, layer in layers.items():
        weight = own[name].get_parameter("weight")
        errors[name] = relative_error(quantize.weight_of(layer), weight if kind == "llama" else weight.T)
    assert len(errors) == (14 if kind == "llama" else 8)
    assert math.isclose(max(errors.values()), report["weights_max"], rel_tol=1e-4)
    assert math.isclose(sum(errors.values()) / len(errors), report["weights_mean"], rel_tol=1e-4)
    assert errors[report["worst"]] == max(errors.values())
    merged = text_logits(plain.model, plain.tokenizer)
    assert math.isclose(relative_error(text_logits(reloaded_model, plain.tokenizer), merged), report["logits"], rel_tol=1e-3)
    with want.disabled():
        assert math.isclose(relative_error(text_logits(want.backbone.model, plain.tokenizer), merged), report["adapter"], rel_tol=1e-3)
    assert f"to {precision}: " in describe_folder(out) and "\n" not in describe_folder(out)
    assert isinstance(generate_text(out, "turn on", max_new_tokens=3), str)


def test_a_classifier_keeps_its_head_whole(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", wide(tmp_path / "m", "bert"), task=CLASSES)
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(export_hf(run, tmp_path / "out", requantize=True))
    assert torch.equal(model.classifier.weight, live.parameters["classifier.weight"])


def test_an_export_warns_if_the_adapter_may_be_lost() -> None:
    figures = {"precision": "nf4", "weights_mean": 0.1, "weights_max": 0.2, "worst": "q", "logits": 0.3, "adapter": 0.1}
    assert "the training may be lost" in describe_requantized(figures)
    assert "lost" not in describe_requantized({**figures, "adapter": 0.9})


def test_an_unquantized_run_cannot_be_quantized_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = wide(tmp_path / "m")
    run, _ = make_run(tmp_path / "run", model)
    (tmp_path / "bare").mkdir()
    for file in (run / "adapter").iterdir():
        (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="the precision to quantize to is in the adapter's run"):
        export_hf(tmp_path / "bare", tmp_path / "out", requantize=True)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["model"]["precision"] = "fp32"
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert main(["export", str(run), "--requantize"]) == 2
    assert "model.precision=fp32, which is not quantized" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", quick([torch.bfloat16, torch.float16, torch.float32], torch.bfloat16))
def test_the_dtype_is_the_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    model = checkpoint(tmp_path / "m", config=llama_config(hidden_size=64, intermediate_size=128, head_dim=32))
    with quiet():
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(model)
    run, live = make_run(tmp_path / "run", model)
    out = export_hf(run, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as f:
        assert {f.get_tensor(n).dtype for n in f.keys()} == {dtype}  # noqa: SIM118
    with quiet():
        reloaded_model = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded_model.dtype is dtype
    want, name = exact_adapter(model, live), "model.layers.0.mlp.up_proj"
    layer = want.model.get_submodule(f"base_model.model.{name}")
    state = live.read(1)
    merged = (
        layer.base_layer.weight.double() + state.spec.scaling[name] * state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
    )
    assert torch.equal(reloaded_model.get_parameter(f"{name}.weight"), merged.float().to(dtype))  # rounded once

"""Edge packages: the card, refused models, and the command."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fedtune.cli.main import main
from fedtune.errors import FedtuneError, ModelError
from fedtune.export.edge import export_edge
from fedtune.inference.engine.package import read_package
from fedtune.inference.engine.shape import Unsupported
from tests.export.test_huggingface import ASK, CAUSAL, CLASSES, make_run
from tests.inference.packages import TEXT, nano_tokenizer
from tests.models.build import checkpoint, hub, llama_config


def test_the_card_names_the_models_origin(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), ASK)
    live.read(3).save(run / "adapter" / "fedtune.safetensors")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["privacy"] |= {"kind": "record", "delta": 1e-6}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"round": 1, "client": None, "exact_match": 0.25, "loss": 2.0},
        {"round": 3, "client": "a", "epsilon": 2.5, "exact_match": 0.9},
        {"round": 3, "client": None, "exact_match": 0.5, "loss": 1.0},
        {"round": 4, "client": None, "exact_match": 0.75},  # a round later than the adapter's
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"torn')
    readme = "- privacy: (ε, δ) = (3.25, 1e-06) for the client that spent most; accountant: PRV, upper bound\n"
    (run / "adapter" / "README.md").write_text(readme)
    for source in (run, run / "adapter"):
        card = read_package(export_edge(source, tmp_path / f"out-{source.name}")).card
        assert card["task"] == "instruction" and card["max_new_tokens"] == 6 and card["base"] == live.backbone.fingerprint
        assert card["metric"] == {"name": "exact_match", "value": 0.5, "round": 3}
        unit = "one training row of a client"
        # of the README: the ledgers had more costs than metrics.jsonl
        assert card["privacy"] == {"kind": "record", "unit": unit, "epsilon": 3.25, "delta": 1e-6}
        assert card["provenance"] == {
            "method": "lora", "round": 3, "base": live.backbone.fingerprint, "run": "run", "name": "run", "strategy": "FedAvg",
            "rounds": 10, "clients_per_round": 10, "seed": 5, "model": "m",
        }  # fmt: skip


def test_a_bare_adapter_s_card_has_only_its_round(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    shutil.copytree(run / "adapter", tmp_path / "bare")
    card = read_package(export_edge(tmp_path / "bare", tmp_path / "out")).card
    assert card["metric"] is None and card["privacy"] is None and card["provenance"]["round"] == 1


# -- refused models -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task", "method", "error", "message"),
    [
        ("llama", CLASSES, "lora", ModelError, "is a classifier, which generates no text: export it with --to hf"),
        ("gpt2", CAUSAL, "lora", Unsupported, "does not support model_type='gpt2'"),
        ("t5", ASK, "lora", Unsupported, "does not support model_type='t5'"),
        ("llama", CAUSAL, "adapter", ModelError, "cannot run peft.method=adapter"),
    ],
)
def test_models_that_the_engine_does_not_support_are_refused(
    tmp_path: Path, kind: str, task: Any, method: str, error: type, message: str
) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", kind)), task, method=method)
    with pytest.raises(error, match=message):
        export_edge(run, run / "edge")
    assert not (run / "edge").exists()


def other_weights(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    stored_tensors = {**load_file(path), **tensors}
    save_file({n: t for n, t in stored_tensors.items() if t is not None}, path, {"format": "pt"})


BAD = {
    "another backbone": (lambda r, m: checkpoint(m, seed=9), "belongs to the backbone"),
    "a weight is missing": (lambda r, m: other_weights(m, **{"model.norm.weight": None}), "'model.norm.weight' is missing from"),
    "another shape": (lambda r, m: other_weights(m, **{"model.norm.weight": torch.ones(7)}), "'model.norm.weight' has another shape in"),
    "integers": (lambda r, m: other_weights(m, **{"model.norm.weight": torch.ones(16, dtype=torch.int32)}), "is I32, wanted 16-bit"),
    "no adapter": (lambda r, m: shutil.rmtree(r / "adapter"), "has no adapter/ yet"),
    "metrics": (lambda r, m: (r / "metrics.jsonl").write_text("{]\n{}\n"), "metrics.jsonl line 1 is damaged"),
    "taken": (lambda r, m: (r / "edge").mkdir() or (r / "edge" / "x").write_text(""), "already exists"),
    "no tokenizer": (lambda r, m: [os.remove(f) for f in m.glob("token*")], "has no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_a_one_sentence_error_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    spoil, message = BAD[name]
    spoil(run, tmp_path / "m")
    with pytest.raises(FedtuneError, match=message) as bad:
        export_edge(run, run / "edge")
    assert "\n" not in str(bad.value)
    assert not list(run.glob(".*")) and (name == "taken" or not (run / "edge").exists())


def test_an_adapter_of_another_shape_is_named(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    name = "model.layers.1.mlp.down_proj"
    state = live.read(1)
    state.replace({**state.tensors, f"{name}.lora_A": torch.ones(3, 5)}).save(run / "adapter" / "fedtune.safetensors")
    with pytest.raises(ModelError, match=rf"'{name}.weight' is \(16, 5\), the backbone's \(16, 24\)"):
        export_edge(run, run / "edge")


# -- the command --------------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_every_format_and_prints_its_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nano_tokenizer(checkpoint(tmp_path / "m", config=llama_config(vocab_size=1024), seed=2))
    run, _ = make_run(tmp_path / "run", hub(model), CAUSAL)
    (tmp_path / "text.txt").write_text(TEXT)
    for arguments, name, note in [
        ([], "merged", ""),
        (["--to", "edge"], "edge", ""),
        (["--to", "edge", "--quantize", "int4", "--method", "gptq", "--calibrate", str(tmp_path / "text.txt")], "edge-int4",
         "quantized to int4 by gptq: the relative error of the weights is"),
        (["--to", "gguf"], "model-f16.gguf", ""),
    ]:  # fmt: skip
        assert main(["export", str(run), *arguments]) == 0
        out, err = capsys.readouterr()
        assert out.strip() == str(run / name) and (run / name).exists()
        assert note in err and bool(err) == bool(note)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int8"], "--quantize is for --to edge, not for --to hf"),
        (["--to", "gguf", "--separate"], "--separate is for --to edge or vllm, not for --to gguf"),
        (["--to", "edge", "--gguf-type", "q8_0"], "--gguf-type is for --to gguf or ollama, not for --to edge"),
        (["--to", "edge", "--requantize"], "--requantize is for --to hf, not"),
        (["--to", "edge", "--quantize", "int4", "--method", "smoothquant", "--calibrate", "x"], "smoothquant is for int8 activations"),
        (["--to", "edge", "--method", "rtn"], "--method rtn needs --quantize"),
        (["--to", "edge", "--quantize", "int4", "--method", "gptq"], "--method gptq needs text"),
    ],
)
def test_incompatible_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["export", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err

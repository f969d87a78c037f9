"""The advice about GGUF files, calibration text, and models that are quantized again."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedtune.config import Config, DataConfig, to_dict
from fedtune.contracts.adapter_state import AdapterState
from fedtune.export.calibrate import read_calibration_texts
from fedtune.export.gguf_tokens import read_vocabulary
from fedtune.export.merged_tensor import MergedTensor
from fedtune.models.backbone import quiet
from fedtune.models.checkpoint import stored_tensors
from tests.advised.exports import export
from tests.advised.models import run_of
from tests.advised.rows import Place, error_of, follows
from tests.export import test_gguf as shapes
from tests.export.test_huggingface import make_run
from tests.inference.engine.tiny import VOCAB
from tests.models.build import checkpoint, hub

GGUF = "--to", "gguf"


def to_each(place: Place, run: Path) -> Iterator[str]:
    """The errors of an export to GGUF, and to each format that this error names instead."""
    error = export(place, run, *GGUF)
    yield error
    for to in error.rpartition("--to ")[2].strip().split(" or "):
        yield export(place, run, "--to", to)


def _shape_row(says: str, shape: str, method: str = "lora") -> None:
    def follow(place: Place) -> Iterator[str]:
        model = shapes.shaped_checkpoint(place.folder / "m", shape)
        yield from to_each(place, make_run(place.folder / "run", hub(model), shapes.SHORT, method=method)[0])

    follows(says, slow=True, library="gguf")(follow)


_shape_row("a GGUF file has no place for the virtual tokens of {}: use --to edge", "llama", "prompt")
_shape_row("llama.cpp's qwen3 has no attention biases: use --to edge or hf", "qwen3_biases")
_shape_row("fedtune does not write GGUF files of model_type={}: use --to edge or hf", "smollm3")
_shape_row("computes YaRN's attention factor itself, but the model sets its own: use --to edge or hf", "llama_yarn_mscale")


@follows("this model (truncate=false) does not: use --to edge or hf", slow=True, library="gguf")
def _(place: Place) -> Iterator[str]:
    yield from to_each(place, shapes.yarn(place.folder, truncate=False))


@follows("has values beyond float16's maximum of 65504: use --to edge or hf", slow=True, library="gguf")
def _(place: Place) -> Iterator[str]:
    model = shapes.shaped_checkpoint(place.folder / "m", "llama")
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name] * 1e7}, model / "model.safetensors", {"format": "pt"})
    yield from to_each(place, make_run(place.folder / "run", hub(model), shapes.SHORT)[0])


@follows("{} already exists: give another file with --out, or remove it", slow=True, library="gguf")
def _(place: Place) -> Iterator[str]:
    run, _ = make_run(place.folder / "run", hub(shapes.shaped_checkpoint(place.folder / "m", "llama")), shapes.SHORT)
    (place.folder / "taken").write_text("mine")
    export = ["fedtune", "export", run, *GGUF, "--out"]
    yield place.run(*export, place.folder / "taken")
    yield place.run(*export, place.folder / "another")
    (place.folder / "taken").unlink()
    yield place.run(*export, place.folder / "taken")


@follows("writing GGUF needs the gguf library: pip install 'fedtune[gguf]'", slow=True, library="gguf")
def _(place: Place) -> Iterator[str]:
    run, _ = make_run(place.folder / "run", hub(shapes.shaped_checkpoint(place.folder / "m", "llama")), shapes.SHORT)
    with place.patch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        yield export(place, run, *GGUF)
    yield export(place, run, *GGUF)  # the extra is installed again


def _tokens(says: str, damage: Callable[[Path], Any]) -> None:
    """Add a row for a tokenizer that llama.cpp cannot express; its advice is an export in Hugging Face's format."""

    def follow(place: Place) -> Iterator[str]:
        damage(tokens := place.folder / "tokens")
        with quiet():
            yield error_of(lambda: read_vocabulary(tokens, AutoTokenizer.from_pretrained(tokens), VOCAB))
        yield export(place, run_of(place), "--to", "hf")

    follows(says, slow=True, library="gguf")(follow)


def _odd_digits(folder: Path) -> None:
    shapes.byte_level(folder, "smollm")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (folder / "tokenizer.json").write_text(json.dumps(raw))


_tokens("llama.cpp does not support this tokenizer's pre-tokenizer ({}): use --to hf", _odd_digits)
_tokens("have several ranks, which scores cannot express: use --to hf", shapes.metaspace)


# -- calibration --------------------------------------------------------------------------------------------------------------------------

CALIBRATE = "--to", "edge", "--quantize", "int8", "--method", "awq", "--calibrate"


@follows("the calibration text has {} tokens: give at least a few thousand", slow=True)
def _(place: Place) -> Iterator[str]:
    text = place.folder / "text.txt"
    for words in (2, 3000):
        text.write_text("light " * words)
        yield export(place, run_of(place), *CALIBRATE, str(text))


@follows("{} holds no calibration text: give a .txt file, or rows with a column 'text'")
def _(place: Place) -> Iterator[str]:
    for name, content in (("rows.jsonl", '{"count": 3}'), ("text.txt", "turn on the light"), ("rows.jsonl", '{"text": "turn on"}')):
        (place.folder / name).write_text(content + "\n")
        yield error_of(lambda name=name: read_calibration_texts(place.folder / name))


@follows("{}; give calibration text instead of the run")
def _(place: Place) -> Iterator[str]:
    (place.folder / "config.yaml").write_text("[")
    yield error_of(lambda: read_calibration_texts(place.folder))
    (place.folder / "text.txt").write_text("turn on the light")
    yield error_of(lambda: read_calibration_texts(place.folder / "text.txt"))


@follows("the training rows of '{}' are not on this machine: give a .txt or .jsonl file instead")
def _(place: Place) -> Iterator[str]:
    config = Config(data=DataConfig(source="local", test_path="t.jsonl"))
    (place.folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    yield error_of(lambda: read_calibration_texts(place.folder))
    (place.folder / "text.txt").write_text("turn on the light")
    yield error_of(lambda: read_calibration_texts(place.folder / "text.txt"))


# -- exports of a quantized backbone ------------------------------------------------------------------------------------------------------


def _quantize(place: Place) -> Path:
    from tests.export.test_requantize import make_run as quantized_run
    from tests.models.test_quantize import wide

    place.patch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))
    return quantized_run(place.folder / "run", wide(place.folder / "m"))[0]


@follows("the merged model cannot be quantized again: {}; export it without --requantize", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    run = _quantize(place)

    def fails(*_: Any) -> Any:
        raise RuntimeError("the model's own code fails on packed weights")

    with place.patch.context() as patch:
        patch.setattr("fedtune.models.quantize.quantized", fails)
        yield export(place, run, "--requantize")
        yield export(place, run)


@follows("the quantized model's '{}' cannot be read back: export it without --requantize", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    run = _quantize(place)
    unique = pytest.importorskip("fedtune.models.quantize").unique_tensors
    with place.patch.context() as patch:
        patch.setattr("fedtune.models.quantize.unique_tensors", lambda model: dict(list(unique(model).items())[1:]))
        yield export(place, run, "--requantize")
        yield export(place, run)


@follows("; the error is no smaller, so the training may be lost: export without --requantize", slow=True, library="bitsandbytes")
def _(place: Place) -> Iterator[str]:
    run = _quantize(place)
    file = run / "adapter/fedtune.safetensors"
    state = AdapterState.load(file)
    state.replace({name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}).save(file)  # an adapter that changes nothing
    assert not export(place, run, "--requantize")
    yield place.warned
    assert not export(place, run)
    yield place.warned if "may be lost" in place.warned else ""


# -- damaged files on the disk -------------------------------------------------------------------------------------------------------------


@follows("which can run code when it is opened: save it as safetensors")
def _(place: Place) -> Iterator[str]:
    adapter = Path(shutil.copytree(run_of(place) / "adapter", place.folder / "adapter"))
    (adapter / "fedtune.safetensors").unlink()
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    yield export(place, adapter)
    save_file(torch.load(adapter / "adapter_model.bin", weights_only=True), adapter / "adapter_model.safetensors")
    yield export(place, adapter)


@follows("{} ends within '{}': it is truncated, download it again")
def _(place: Place) -> Iterator[str]:
    model = checkpoint(place.folder / "m")
    (stored, *_) = stored_tensors(model)
    whole = stored.file.read_bytes()
    for content in (whole[: stored.start + 8], whole):  # cut short after its header was read
        stored.file.write_bytes(content)
        yield error_of(lambda: MergedTensor(stored).read(torch.float32))

"""One folder, several readers: training, export and the engine read it as transformers' `from_pretrained` does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedtune.config import ModelConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.inference.edge import export_edge
from fedtune.inference.engine.load import load_engine
from fedtune.models import fingerprint, load_backbone
from tests.inference.engine.test_load import CLOSE, logits, theirs
from tests.inference.engine.tiny import tiny_model
from tests.models.build import tokenizer

# -- weights ------------------------------------------------------------------------------------------------------------------------------


def shards(folder: Path, *, change: float = 0.0, name: str = "model") -> None:
    """Two shards of the folder's weights with their index; every weight is off by `change`."""
    whole = {n: t + change for n, t in load_file(folder / "model.safetensors").items()}
    names = sorted(whole)
    for i in range(2):
        save_file({n: whole[n] for n in names[i::2]}, folder / f"{name}-{i}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f"{name}-{i % 2}.safetensors" for i, n in enumerate(names)}}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def lay(folder: Path, layout: str) -> None:
    """Change a folder that holds config.json and model.safetensors."""
    single, config = folder / "model.safetensors", folder / "config.json"
    if layout == "stale index":
        shards(folder, change=0.1)
    elif layout == "shards":
        shards(folder)
        single.unlink()
    elif layout == "shards and a file that no index names":
        shards(folder)
        single.rename(folder / "consolidated.safetensors")
        save_file({"model.norm.weight": torch.zeros(48)}, folder / "consolidated.safetensors")
    elif layout == "a tensor in two shards":
        shards(folder)
        last = load_file(folder / "model-1.safetensors")
        save_file({**last, "model.norm.weight": torch.full((48,), 1.5)}, folder / "model-1.safetensors", {"format": "pt"})
        first = load_file(folder / "model-0.safetensors")
        save_file({**first, "model.norm.weight": torch.full((48,), 0.5)}, folder / "model-0.safetensors", {"format": "pt"})
        single.unlink()
    elif layout == "pickles beside":
        (folder / "pytorch_model.bin").write_bytes(b"old")
    elif layout == "weights that config.json names":
        tensors = {n: t + 0.1 for n, t in load_file(single).items()}
        save_file(tensors, folder / "other.safetensors", {"format": "pt"})
        config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_weights": "other.safetensors"}))
    elif layout == "an index that config.json names":
        shards(folder, change=0.1, name="other")
        config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_weights": "other.safetensors.index.json"}))
    elif layout == "shards without an index":
        shards(folder)
        single.unlink()
        (folder / "model.safetensors.index.json").unlink()
    elif layout == "another name":
        single.rename(folder / "weights.safetensors")
    else:
        assert layout == "one file"


@pytest.mark.parametrize(
    "layout",
    ["one file", "stale index", "shards", "shards and a file that no index names", "a tensor in two shards", "pickles beside",
     "weights that config.json names", "an index that config.json names"],
)  # fmt: skip
def test_every_reader_takes_the_files_that_transformers_takes(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_model("mistral", folder)
    tokenizer().save_pretrained(folder)
    lay(folder, layout)
    wanted = theirs(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval())
    torch.testing.assert_close(logits(load_engine(folder)), wanted, **CLOSE)
    torch.testing.assert_close(logits(load_engine(export_edge(folder, tmp_path / "edge"))), wanted, **CLOSE)
    trained = load_backbone(ModelConfig(source="hub", name=str(folder), device="cpu"), TaskConfig(kind="causal_lm", max_length=8))
    torch.testing.assert_close(theirs(trained.model), wanted, **CLOSE)


@pytest.mark.parametrize("layout", ["shards without an index", "another name"])
def test_what_transformers_does_not_read_no_reader_reads(layout: str, tmp_path: Path) -> None:
    tiny_model("mistral", tmp_path)
    lay(tmp_path, layout)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for read in (load_engine, fingerprint):
        with pytest.raises(ModelError, match="has no weights: model.safetensors"):
            read(tmp_path)

"""Training, export and the engine read a folder like transformers' `from_pretrained`."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.auto import tokenization_auto

from fedtune.config import ModelConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.export.edge import export_edge
from fedtune.export.huggingface import write_tokenizer
from fedtune.inference.engine.generate import Generation
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.text import Text, read_text
from fedtune.models import fingerprint, load_backbone
from fedtune.models.quiet import quiet
from fedtune.models.tokens import load_tokenizer
from tests.inference.engine.test_load import CLOSE, logits, theirs
from tests.inference.engine.tiny import tiny_model
from tests.inference.tokenizer_table import CLASSES, CONFIGS, FAMILIES, NEWER, TEXTS, TOKENIZERS, make
from tests.models.build import checkpoint, llama_config, tokenizer
from tests.quick import quick

# -- weights ------------------------------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, *, change: float = 0.0, name: str = "model") -> None:
    """Two shards of the folder's weights with their index; every weight is off by `change`."""
    whole = {n: t + change for n, t in load_file(folder / "model.safetensors").items()}
    names = sorted(whole)
    for i in range(2):
        save_file({n: whole[n] for n in names[i::2]}, folder / f"{name}-{i}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f"{name}-{i % 2}.safetensors" for i, n in enumerate(names)}}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def change_layout(folder: Path, layout: str) -> None:
    """Change a folder that holds config.json and model.safetensors."""
    single, config = folder / "model.safetensors", folder / "config.json"
    if layout == "stale index":
        write_shards(folder, change=0.1)
    elif layout == "shards":
        write_shards(folder)
        single.unlink()
    elif layout == "shards and a file that no index names":
        write_shards(folder)
        single.rename(folder / "consolidated.safetensors")
        save_file({"model.norm.weight": torch.zeros(48)}, folder / "consolidated.safetensors")
    elif layout == "a tensor in two shards":
        write_shards(folder)
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
        write_shards(folder, change=0.1, name="other")
        config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_weights": "other.safetensors.index.json"}))
    elif layout == "shards without an index":
        write_shards(folder)
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
def test_every_reader_reads_the_same_files_as_transformers(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    tiny_model("mistral", folder)
    tokenizer().save_pretrained(folder)
    change_layout(folder, layout)
    wanted = theirs(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval())
    torch.testing.assert_close(logits(load_engine(folder)), wanted, **CLOSE)
    torch.testing.assert_close(logits(load_engine(export_edge(folder, tmp_path / "edge"))), wanted, **CLOSE)
    trained = load_backbone(ModelConfig(source="hub", name=str(folder), device="cpu"), TaskConfig(kind="causal_lm", max_length=8))
    torch.testing.assert_close(theirs(trained.model), wanted, **CLOSE)


@pytest.mark.parametrize("layout", ["shards without an index", "another name"])
def test_no_reader_reads_a_folder_that_transformers_refuses(layout: str, tmp_path: Path) -> None:
    tiny_model("mistral", tmp_path)
    change_layout(tmp_path, layout)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for read in (load_engine, fingerprint):
        with pytest.raises(ModelError, match="has no weights: it needs model.safetensors"):
            read(tmp_path)


# -- tokenizers ---------------------------------------------------------------------------------------------------------------------------


def training_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text in training."""
    lead = [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
    return lead + tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(autouse=True)
def configs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers' tokenizers read equal config.json files once: it is the slowest part of loading a tokenizer."""
    read, known = AutoConfig.from_pretrained, dict[tuple[object, ...], PreTrainedConfig]()

    def remember(folder: Path, **how: Any) -> PreTrainedConfig:
        key = (Path(folder) / "config.json").read_bytes(), *sorted(how.items(), key=str)
        if key not in known:
            known[key] = read(folder, **how)
        return known[key]

    monkeypatch.setattr(tokenization_auto, "AutoConfig", SimpleNamespace(from_pretrained=remember))


def compare(work: Path, family: str, kind: str, config: str, named: str | None) -> None:
    """Compare the folder, its export and its edge package, as the engine and transformers read them."""
    where, folder = f"{family}, {kind}, {config}, {named}", make(work / "m", family, kind, config, named)
    with quiet():
        theirs = AutoTokenizer.from_pretrained(folder)
    wanted = [training_ids(theirs, text) for text in TEXTS]
    names = {n: str(t) for n, t in theirs.special_tokens_map.items() if isinstance(t, str)}
    task = TaskConfig(kind="causal_lm")
    trained = load_tokenizer(folder, ModelConfig(source="hub", name=str(folder)), task)
    for which in ("export", "edge"):
        out = work / which
        out.mkdir()
        if which == "export":
            shutil.copyfile(folder / "config.json", out / "config.json")
        write_tokenizer(trained, folder, out, task)
    with quiet():
        again = AutoTokenizer.from_pretrained(work / "export")
    assert [training_ids(again, text) for text in TEXTS] == wanted, f"transformers on the export: {where}"
    texts = dict[str, Text]()
    if kind == "words" and type(theirs).__name__ != "TokenizersBackend":  # a class for BPE misreads a list of words
        with pytest.raises(ModelError, match="set tokenizer_class to PreTrainedTokenizerFast"):
            read_text(folder)
    else:
        texts = {"folder": read_text(folder), "export": read_text(work / "export")}
    texts["edge"] = read_text(work / "edge", saved=True)
    for which, text in texts.items():
        assert [text.encode(t) for t in TEXTS] == wanted, f"the engine on the {which}: {where}"
        assert text._names == names, f"the engine on the {which}: {where}"
        back = [text.decode(ids) for ids in wanted]
        assert back == [theirs.decode(ids, skip_special_tokens=True) for ids in wanted], f"the engine on the {which}: {where}"


PAIRS = [
    (FAMILIES[(i + j) % len(FAMILIES)], list(TOKENIZERS)[(i + 2 * j) % len(TOKENIZERS)], config, named)
    for i, config in enumerate(CONFIGS)
    for j, named in enumerate(CLASSES)
]


@pytest.mark.parametrize("config", quick(CONFIGS, "legacy", "typed", "prefix space", "bos asked", "names of flagged tokens", "added file"))
def test_every_reader_makes_the_same_tokenizer(config: str, tmp_path: Path) -> None:
    """Each config with each class, over model types and tokenizers in turn."""
    mine = [pair for pair in PAIRS if pair[2] == config]
    assert len(mine) == len(CLASSES)
    for i, pair in enumerate(mine):
        compare(tmp_path / str(i), *pair)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_reader_makes_the_same_tokenizer_in_every_case(family: str, kind: str, tmp_path: Path) -> None:
    for i, (config, named) in enumerate(itertools.product(CONFIGS, CLASSES)):
        compare(tmp_path / str(i), family, kind, config, named)


@pytest.mark.parametrize("family", quick(NEWER, "gemma2"))
def test_newer_models_have_the_tokenizer_of_transformers(family: str, tmp_path: Path) -> None:
    kinds = [("prepend", None), ("prepend", "GemmaTokenizer"), ("first", "GemmaTokenizer"), ("llama3", "GPT2TokenizerFast")]
    for i, ((kind, named), config) in enumerate(itertools.product(kinds, ("none", "names of flagged tokens", "typed"))):
        compare(tmp_path / str(i), family, kind, config, named)


@pytest.mark.parametrize(
    ("family", "kind", "config", "named"),
    [("llama", "prepend", "legacy", "LlamaTokenizer"), ("llama", "first", "typed", "LlamaTokenizerFast"),
     ("llama", "llama3", "bos refused", "PreTrainedTokenizerFast"), ("qwen3", "qwen2", "other flags", "Qwen2Tokenizer")],
)  # fmt: skip
def test_a_folder_and_its_package_answer_as_transformers(family: str, kind: str, config: str, named: str, tmp_path: Path) -> None:
    folder, shape = make(tmp_path / "m", family, kind, config, named), Qwen3Config if family == "qwen3" else LlamaConfig
    checkpoint(tmp_path / "w", config=llama_config(shape, vocab_size=400, bos_token_id=None, eos_token_id=None))
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tmp_path / "w" / name, folder / name)
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    package = export_edge(folder, tmp_path / "edge")
    for text in ("hi ab 12", "<s> hi </s>  b", "a <|user|> hi <|end|> \n ab"):
        ids = torch.tensor([training_ids(tokenizer, text)])
        with quiet():
            wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=-1)
        for source in (folder, package):
            engine = load_engine(source)
            engine.text.ends = frozenset()
            result = [piece.token for piece in Generation(engine, engine.text.encode(text), Sampling(), 8) if piece.token is not None]
            assert result == wanted[0, ids.shape[1] :].tolist()

"""`--to hf` reads tensor by tensor, with the same bits as a merge of the complete model in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
)

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import ModelError
from fedtune.export.huggingface import describe_folder, export_hf, stored_dtype, write_tokenizer
from fedtune.export.origin import read_origin
from fedtune.export.outline import _number, _numbered
from fedtune.export.whole import merge_adapter, put_heads
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.backbone import quiet
from tests.export.test_huggingface import ASK, CAUSAL, CLASSES, make_run
from tests.models.build import CONFIGS, ENCODERS, checkpoint, hub, llama_config
from tests.quick import quick

METHODS = ("lora", "rslora", "dora", "ia3", "bitfit", "full", "prompt", "ravan", "fedsb")
KINDS = (*CONFIGS, "gpt_neox")


def small_neox() -> GPTNeoXConfig:
    """A model whose weights have other names in its files than in memory."""
    return GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, initializer_range=0.3, hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0,
    )  # fmt: skip


def stored_checkpoint(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """A checkpoint of that architecture, in that precision."""
    checkpoint(folder, kind, config=small_neox() if kind == "gpt_neox" else None, **save)
    for file in folder.glob("*.safetensors"):
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


def in_memory(run: Path, folder: Path) -> Path:
    """The merge of the complete model in memory, rounded at the end and saved by transformers."""
    origin = read_origin(run)
    backbone = load_backbone(origin.model, origin.task, **origin.settings)
    dtype, model = stored_dtype(backbone.folder), backbone.model
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    put_heads(model, origin.adapter, origin.task)
    merge_adapter(model, origin)
    if origin.labels and origin.task.kind == "classification":
        model.config.id2label = dict(enumerate(origin.labels))
        model.config.label2id = {label: i for i, label in enumerate(origin.labels)}
    for parameter in model.parameters():
        parameter.data = parameter.data.float().to(dtype)
    with quiet():
        model.save_pretrained(folder)
    write_tokenizer(backbone.tokenizer, backbone.folder, folder, origin.task)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def check(run: Path, out: Path, wanted: Path) -> None:
    export_hf(run, out)
    assert not describe_folder(out) or "in memory" not in describe_folder(out)
    for name in ("config.json", "generation_config.json"):
        assert (out / name).is_file() == (wanted / name).is_file()
        assert not (out / name).is_file() or json.loads((out / name).read_text()) == json.loads((wanted / name).read_text())
    actual, whole = tensors(out), tensors(wanted)
    assert set(actual) == set(whole)
    for name, tensor in whole.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def cell(kind: str, method: str, index: int) -> Any:
    """A cell of the matrix: quick for LoRA on some architectures and for all methods on the one with transposed weights, else slow."""
    quick = method == "lora" and kind in ("llama", "bert", "t5") or kind == "gpt2" and (index % 2 == 0 or method in ("lora", "dora"))
    return pytest.param(kind, method, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "method"), [cell(k, m, i) for k in KINDS for i, m in enumerate(METHODS)])
def test_the_export_equals_the_merge_in_memory(tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.export.merged_tensor._BLOCK", 100)  # some rows, or columns, at a time
    task = ASK if kind == "t5" else CLASSES if kind in (*ENCODERS, "opt") else CAUSAL
    dtype = (torch.bfloat16, torch.float32, torch.float16)[KINDS.index(kind) % 3]
    folder = stored_checkpoint(tmp_path / "m", kind, dtype, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    try:
        run, _ = make_run(tmp_path / "run", hub(folder), task, method=method)
    except ModelError as no:
        pytest.skip(str(no))  # no biases, or an architecture that PEFT has no prompts for
    wanted = in_memory(run, tmp_path / "wanted")
    loaded = "fedtune.models.backbone._pretrained_model"
    monkeypatch.setattr(loaded, lambda *_: pytest.fail("the whole model is in memory"))
    check(run, run / "merged", wanted)


@pytest.mark.parametrize("kind", quick(["llama", "gpt2", "bert", "t5"], "gpt2", "t5"))
def test_shifts_are_merged_as_in_memory(tmp_path: Path, kind: str) -> None:
    task = ASK if kind == "t5" else CLASSES if kind == "bert" else CAUSAL
    run, live = make_run(tmp_path / "run", hub(stored_checkpoint(tmp_path / "m", kind)), task)
    with_shifts(run, live)
    check(run, run / "merged", in_memory(run, tmp_path / "wanted"))


def with_shifts(run: Path, live: LiveAdapter) -> None:
    generator = torch.Generator().manual_seed(7)
    for version in (1, 2):
        spec = live.spec
        factors = {n: p for n, p in live.parameters.items() if ".lora_" in n}
        drawn = {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in factors.items()}
        shift = AdapterState(drawn, AdapterSpec(method="lora", ranks=spec.ranks, scaling=spec.scaling, version=version))
        shift.save(run / "adapter" / f"shift-{version:04d}.safetensors")


# -- names --------------------------------------------------------------------------------------------------------------------------------


def rename(folder: Path, change: Any) -> Path:
    path = folder / "model.safetensors"
    save_file({change(n): t for n, t in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("how", ["bare", "wrapped", "legacy"])
def test_other_names_in_the_checkpoint(tmp_path: Path, how: str) -> None:
    """Checkpoints with or without a head's wrapper, and with TensorFlow's names of norms."""
    kind, task = ("llama", CAUSAL) if how == "bare" else ("bert", CLASSES)
    folder = checkpoint(tmp_path / "m", kind)
    if how == "bare":
        rename(folder, lambda n: n.removeprefix("model."))
    elif how == "wrapped":
        rename(folder, lambda n: f"bert.{n}")
    else:
        rename(folder, lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    run, _ = make_run(tmp_path / "run", hub(folder), task)
    check(run, run / "merged", in_memory(run, tmp_path / "wanted"))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_embedding_that_is_stored_twice_is_merged_as_in_memory(tmp_path: Path, same: bool) -> None:
    folder = checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    stored_tensors = load_file(path)
    twin = stored_tensors["model.embed_tokens.weight"].clone()
    save_file({**stored_tensors, "lm_head.weight": twin if same else twin + 1}, path, {"format": "pt"})
    run, _ = make_run(tmp_path / "run", hub(folder), CAUSAL)
    check(run, run / "merged", in_memory(run, tmp_path / "wanted"))
    assert ("lm_head.weight" in tensors(run / "merged")) != same


@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_of_the_checkpoint_is_used_if_it_fits(tmp_path: Path, labels: int) -> None:
    """A head with another number of classes is initialized as in the run."""
    config = llama_config(num_labels=labels)
    checkpoint(tmp_path / "m", config=config)
    with quiet(), torch.random.fork_rng():
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "m")
    run, _ = make_run(tmp_path / "run", hub(tmp_path / "m"), CLASSES)
    check(run, run / "merged", in_memory(run, tmp_path / "wanted"))
    assert tensors(run / "merged")["score.weight"].shape == (3, 16)


@pytest.mark.parametrize("roberta", [2, 3])
def test_a_head_is_initialized_completely_or_not_at_all(tmp_path: Path, roberta: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["roberta"]()
    config.num_labels = roberta
    checkpoint(tmp_path / "m", "roberta", config=config)
    with quiet(), torch.random.fork_rng():
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "m")
    run, _ = make_run(tmp_path / "run", hub(tmp_path / "m"), CLASSES)
    monkeypatch.setattr("fedtune.export.whole.trained_heads", lambda model, task: [])  # so that the adapter has no head
    own = AdapterState.load(run / "adapter" / "fedtune.safetensors")
    own.subset([n for n in own.tensors if ".lora_" in n]).save(run / "adapter" / "fedtune.safetensors")
    monkeypatch.setattr("fedtune.export.origin._settings", lambda *_: {"num_labels": 3, "seed": 5})
    check(run, run / "merged", in_memory(run, tmp_path / "wanted"))
    kept = torch.equal(tensors(run / "merged")["classifier.dense.weight"], tensors(tmp_path / "m")["classifier.dense.weight"])
    assert kept == (roberta == 3)


def test_several_shards_equal_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path / "run", hub(stored_checkpoint(tmp_path / "m", "gpt2", torch.bfloat16)), CAUSAL)
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(in_memory(run, tmp_path / "wanted"), dtype=torch.bfloat16)
        whole.save_pretrained(tmp_path / "wanted", max_shard_size="5KB")
    shutil.copyfile(tmp_path / "m" / "generation_config.json", tmp_path / "wanted" / "generation_config.json")
    (tmp_path / "wanted" / "model.safetensors").unlink()
    monkeypatch.setattr("fedtune.export.outline._SHARD", "5KB")
    check(run, run / "merged", tmp_path / "wanted")
    index = json.loads((run / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == json.loads((tmp_path / "wanted" / "model.safetensors.index.json").read_text())["metadata"]
    assert set(index["weight_map"].values()) == {f.name for f in (run / "merged").glob("*.safetensors")} and len(index["weight_map"]) > 9
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.bfloat16)
    assert all(torch.equal(p, whole.get_parameter(n)) for n, p in model.named_parameters())


# -- weights that are not read tensor by tensor -------------------------------------------------------------------------------------------


def test_weights_in_another_layout_are_merged_in_memory_with_a_note(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        num_local_experts=3, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", config=config)), CAUSAL)
    assert any(".experts.2." in n for n in tensors(tmp_path / "m"))  # separate in the file, one tensor in the model
    description = describe_folder(export_hf(run, run / "merged"))
    assert "experts" in description and description.endswith("in another form than the model, so the model was merged in memory")
    wanted = tensors(in_memory(run, tmp_path / "wanted"))
    assert all(torch.allclose(t, wanted[n], rtol=0, atol=1e-6) for n, t in tensors(run / "merged").items())


def test_a_random_backbone_is_merged_in_memory_with_a_note(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m"), init="random"), CAUSAL)
    note = "the backbone was initialized at random (model.init=random), so the model was merged in memory"
    assert describe_folder(export_hf(run, run / "merged")) == note


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.9.mlp.up_proj", "is not a linear layer of the backbone"),
        ("model.norm", "is not a linear layer of the backbone"),
        ("lm_head", "is tied to the embedding"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path, name: str, words: str) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    path, state = run / "adapter" / "fedtune.safetensors", live.read(1)
    spec = AdapterSpec(method="lora", base=state.spec.base, ranks={name: 2}, scaling={name: 1.0}, version=1)
    AdapterState({f"{name}.lora_A": torch.ones(2, 16), f"{name}.lora_B": torch.ones(32, 2)}, spec).save(path)
    with pytest.raises(ModelError, match=words):
        export_hf(run, run / "merged")
    assert not (run / "merged").exists()


def test_a_missing_or_misshapen_weight_is_named(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    path = tmp_path / "m" / "model.safetensors"
    stored_tensors = load_file(path)
    norm = stored_tensors.pop("model.norm.weight")
    save_file(stored_tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match="'model.norm.weight' is missing from"):
        export_hf(run, run / "merged")
    save_file({**stored_tensors, "model.norm.weight": norm[:3]}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="'model.norm.weight' has another shape in"):
        export_hf(run, run / "merged")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_represents_the_placeholder_numbers(dtype: torch.dtype) -> None:
    assert [_number(_numbered(i, dtype)) for i in (0, 255, 256, 65537, 16777215)] == [0, 255, 256, 65537, 16777215]

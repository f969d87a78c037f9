import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from fedtune.config import Config, DataConfig, ModelConfig, PeftConfig, TaskConfig, to_dict
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import CheckpointError, FedtuneError, ModelError
from fedtune.export import export_hf
from fedtune.export.huggingface import describe_folder
from fedtune.inference import generate_text
from fedtune.models import LiveAdapter, load_backbone
from fedtune.models.backbone import quiet
from fedtune.models.shift import FrozenWeights
from tests.models.build import checkpoint, hub, token_ids
from tests.quick import quick

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=32), TaskConfig(kind="classification", max_length=32)
ASK = TaskConfig(kind="instruction", max_length=32, max_new_tokens=6)
STORIES = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[2] / "../shared/data")) / "models/stories260k/hf"


LOCAL = DataConfig(source="local", path="x")


def make_run(
    folder: Path, model: ModelConfig, task: TaskConfig, *, std: float = 0.1, data: DataConfig = LOCAL, method: str = "lora"
) -> tuple[Path, LiveAdapter]:
    """The parts of a run directory that the export reads, and the live adapter whose logits the export must have."""
    peft = PeftConfig(method=method, rank=3, alpha=12.0, tokens=4, bottleneck=5)
    live = LiveAdapter(load_backbone(model, task, num_labels=3, seed=5), peft, task)
    generator = torch.Generator().manual_seed(0)
    offset = 1.0 if method == "ia3" else 0.0  # factors around one
    live.load(live.read(0).replace({n: torch.randn(p.shape, generator=generator) * std + offset for n, p in live.parameters.items()}))
    (folder / "adapter").mkdir(parents=True)
    live.save_peft(folder / "adapter")
    live.read(1).save(folder / "adapter" / "fedtune.safetensors")
    stored = to_dict(Config(model=model, task=task, seed=5, data=data, peft=peft))
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    (folder / "partition.json").write_text(json.dumps({"labels": ["low", "mid", "high"] if task is CLASSES else []}))
    return folder, live


@pytest.mark.parametrize(
    ("kind", "task"),
    quick(
        [("llama", CAUSAL), ("gpt2", CAUSAL), ("llama", CLASSES), ("gpt2", CLASSES), ("bert", CLASSES), ("roberta", CLASSES)],
        ("gpt2", CAUSAL),
        ("bert", CLASSES),
    ),
)
def test_the_merged_model_gives_the_logits_of_backbone_and_adapter(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", kind)), task)
    out = export_hf(run, run / "merged")
    assert out == run / "merged"
    with quiet():
        model = (AutoModelForCausalLM if task is CAUSAL else AutoModelForSequenceClassification).from_pretrained(out)
    torch.testing.assert_close(model(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=1e-5)
    with live.disabled():
        assert not torch.allclose(model(token_ids()).logits, live.model(token_ids()).logits, atol=1e-2)
    assert AutoTokenizer.from_pretrained(out)("turn on").input_ids == live.backbone.tokenizer("turn on").input_ids
    if task is CLASSES:
        assert model.config.id2label == {0: "low", 1: "mid", 2: "high"}
    assert sorted(p.name for p in run.iterdir()) == ["adapter", "config.yaml", "merged", "partition.json"]  # no temporary files are left


def test_a_bare_adapter_folder_names_its_backbone(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CLASSES)
    (run / "adapter" / "fedtune.safetensors").unlink()
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(export_hf(run / "adapter", tmp_path / "out"))
    torch.testing.assert_close(model(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=1e-5)


def test_an_adapter_of_the_embedded_backbone_finds_it_on_another_machine(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", ModelConfig(device="cpu"), CAUSAL, std=0.02)
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/elsewhere/nano"}))
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(export_hf(run / "adapter", tmp_path / "out"))
    want = live.model(token_ids()).logits
    torch.testing.assert_close(model(token_ids()).logits, want, rtol=0, atol=2e-6 * want.abs().max().item())


def test_rank_patterns_and_scaling_of_foreign_adapters_are_merged(tmp_path: Path) -> None:
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)  # PEFT draws the factors
        base = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "m"))
        settings = LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.1.mlp.up_proj": 2},
            alpha_pattern={"q_proj": 3}, init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(base, settings)
        model.save_pretrained(str(tmp_path / "adapter"))
        reloaded_model = AutoModelForCausalLM.from_pretrained(export_hf(tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close(reloaded_model(token_ids()).logits, model(token_ids()).logits, rtol=0, atol=1e-5)


def test_a_run_in_bf16_or_from_random_weights_is_merged_in_float32(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    for name, changes in {"half": {"precision": "bf16"}, "random": {"init": "random"}}.items():
        run, live = make_run(tmp_path / name, hub(folder, **changes), CAUSAL)
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(export_hf(run, run / "merged"))
        assert model.dtype is torch.float32
        full = load_backbone(hub(folder, init=changes.get("init", "pretrained")), CAUSAL, seed=5)
        exact = LiveAdapter(full, PeftConfig(rank=3, alpha=12.0), CAUSAL)
        exact.load(live.read(0))
        torch.testing.assert_close(model(token_ids()).logits, exact.model(token_ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "want"),
    [(DataConfig(source="local", path="x", prompt="Q: {q}\nA:", answer=" {a}"), "Q: {q}\nA:"),
     (DataConfig(source="local", path="x", columns={"prompt": "ask {q}:"}), "ask {q}:"),
     (DataConfig(source="local", path="x", columns={"prompt": "q"}), None), (DataConfig(), "Request: {request}\nAction:")],
)  # fmt: skip
def test_the_prompt_template_is_exported_with_the_model(tmp_path: Path, data: DataConfig, want: str | None) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), ASK, data=data)
    card = json.loads((export_hf(run, run / "merged") / "fedtune.json").read_text())
    assert card == {"task": "instruction", "prompt": want, "max_new_tokens": 6, "base": live.backbone.fingerprint}


def test_only_an_export_is_replaced_and_only_with_the_flag(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    out = export_hf(run, tmp_path / "out")
    with pytest.raises(ModelError, match="already exists"):
        export_hf(run, out)
    export_hf(run, out, replace=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ModelError, match="already exists"):
        export_hf(run, tmp_path / "mine", replace=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    with pytest.raises(ModelError, match="already exists"):
        export_hf(run, tmp_path / "mine" / "thesis.txt")


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


BAD = {
    "no folder": (lambda r: shutil.rmtree(r), "there is no folder"),
    "neither": (lambda r: os.remove(r / "config.yaml"), "neither a run directory"),
    "not ended": (lambda r: shutil.rmtree(r / "adapter"), "has no adapter/ yet"),
    "yaml": (lambda r: (r / "config.yaml").write_text("a: [b"), "cannot read .*config.yaml"),
    "yaml kind": (lambda r: (r / "config.yaml").write_text("3"), "cannot use .*config.yaml"),
    "unknown key": (lambda r: (r / "config.yaml").write_text("color: red"), "unknown config key color"),
    "labels": (lambda r: (r / "partition.json").write_text("[]"), "cannot read .*partition.json"),
    "spec": (lambda r: (r / "adapter/fedtune.safetensors").write_bytes(b"x"), "cannot read the adapter .*fedtune.safetensors"),
    "shift": (lambda r: (r / "adapter/shift-0001.safetensors").write_bytes(b"x"), "cannot read the adapter .*shift-0001"),
    "its config": (lambda r: (r / "adapter/adapter_config.json").write_text("{"), "must be the JSON of a PEFT adapter"),
}  # fmt: skip
# damages of a folder that only PEFT wrote
BAD_PEFT = {
    "config": (lambda a: (a / "adapter_config.json").write_text("{"), "must be the JSON of a PEFT LoRA adapter"),
    "peft kind": (lambda a: change_json(a / "adapter_config.json", peft_type="IA3"), "of type IA3"),
    "dora": (lambda a: change_json(a / "adapter_config.json", use_dora=True), "use_dora=True is not plain LoRA"),
    "rank": (lambda a: change_json(a / "adapter_config.json", r=0), "must be the JSON of a PEFT LoRA adapter"),
    "a module's rank": (lambda a: change_json(a / "adapter_config.json", rank_pattern={"q": 0}), "must be the JSON of a PEFT LoRA adapter"),
    "a pattern": (lambda a: change_json(a / "adapter_config.json", alpha_pattern={"(": 2}), "must be the JSON of a PEFT LoRA adapter"),
    "weights": (lambda a: os.remove(a / "adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "truncated": (lambda a: truncate(a / "adapter_model.safetensors"), "damaged or truncated"),
    "pickle": (lambda a: os.rename(a / "adapter_model.safetensors", a / "adapter_model.bin"), "only a pickled adapter_model.bin"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD, *BAD_PEFT])
def test_bad_sources_give_a_one_sentence_error(tmp_path: Path, case: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    spoil, words = {**BAD, **BAD_PEFT}[case]
    if case in BAD_PEFT:
        (run / "adapter" / "fedtune.safetensors").unlink()
    spoil(run / "adapter" if case in BAD_PEFT else run)
    with pytest.raises(FedtuneError, match=words) as bad:
        export_hf(run, tmp_path / "out")
    assert "\n" not in str(bad.value) and not (tmp_path / "out").exists()


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    shutil.rmtree(tmp_path / "m")
    checkpoint(tmp_path / "m", seed=1)
    with pytest.raises(ModelError, match="belongs to the backbone .* use the checkpoint that it was trained on"):
        export_hf(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "m")
    checkpoint(tmp_path / "m", "gpt2")
    (run / "adapter" / "fedtune.safetensors").unlink()
    with pytest.raises(ModelError, match="is not a linear layer of the backbone"):
        export_hf(run, tmp_path / "out")


def test_an_unwritable_run_directory_is_refused(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    with pytest.raises(ModelError, match="cannot write"):
        export_hf(run, run / "config.yaml" / "merged")


def test_a_folder_without_a_run_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        export_hf(tmp_path / "nowhere", tmp_path / "out")


# -- all methods, and shifts of the frozen weights ---------------------------------------------------------------------------------------


MERGED = ["dora", "rslora", "ia3", "bitfit", "full", "ravan", "fedsb"]
BESIDE = ["prompt", "prefix", "ptuning_v2", "adapter"]


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize(
    ("kind", "task"), [("qwen2", CAUSAL), ("gpt2", CAUSAL), ("opt", CLASSES), ("distilbert", CLASSES), ("albert", CLASSES)]
)
def test_methods_that_weights_can_express_are_merged(tmp_path: Path, method: str, kind: str, task: TaskConfig) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", kind)), task, method=method)
    with quiet():
        model = (AutoModelForCausalLM if task is CAUSAL else AutoModelForSequenceClassification).from_pretrained(
            export_hf(run, run / "merged")
        )
    want = live.model(token_ids()).logits
    torch.testing.assert_close(model(token_ids()).logits, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))
    with live.disabled():
        assert not torch.allclose(model(token_ids()).logits, live.model(token_ids()).logits, atol=1e-2)
    assert not describe_folder(run / "merged") and not (run / "merged" / "adapter").exists()


def test_an_encoder_decoder_is_merged_from_its_run_and_from_its_folder(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", "t5")), ASK)
    shutil.copytree(run / "adapter", tmp_path / "copied")
    more = {"decoder_input_ids": token_ids(columns=4, seed=2)}
    want = live.model(token_ids(), **more).logits
    for source, out in ((run, run / "merged"), (tmp_path / "copied", tmp_path / "out")):
        with quiet():
            model = AutoModelForSeq2SeqLM.from_pretrained(export_hf(source, out))
        torch.testing.assert_close(model(token_ids(), **more).logits, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_a_dora_merge_without_the_norm_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.Tensor.norm", lambda t, dim: torch.ones(t.shape[0], dtype=t.dtype))  # m / ‖W‖ with norms of 1
    with pytest.raises(AssertionError, match="not close"):
        test_methods_that_weights_can_express_are_merged(tmp_path, "dora", "gpt2", CAUSAL)


def shift(live: LiveAdapter, version: int, rank: int) -> AdapterState:
    """A stack of factors at every other module, with a scaling of its own."""
    generator = torch.Generator().manual_seed(version)
    tensors = {}
    modules = list(live.spec.ranks)[version % 2 :: 2]
    for m in modules:
        for end, axis in ((".lora_A", 0), (".lora_B", 1)):
            shape = list(live.parameters[m + end].shape)
            shape[axis] = rank
            tensors[m + end] = 0.2 * torch.randn(shape, generator=generator)
    return AdapterState(
        tensors, AdapterSpec(method="lora", version=version, ranks=dict.fromkeys(modules, rank), scaling=dict.fromkeys(modules, 0.5))
    )


@pytest.mark.parametrize(("kind", "task"), [("llama", CAUSAL), ("gpt2", CLASSES)])
def test_shifts_of_the_frozen_weights_are_merged_first(tmp_path: Path, kind: str, task: TaskConfig) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", kind)), task)
    frozen = FrozenWeights(live.backbone.model)
    for state in (shift(live, 1, 5), shift(live, 12, 2)):
        frozen.add(state)
        state.save(run / "adapter" / f"shift-{state.spec.version:04d}.safetensors")
    auto = AutoModelForCausalLM if task is CAUSAL else AutoModelForSequenceClassification
    shutil.copytree(run / "adapter", tmp_path / "copied")  # the adapter's folder has the shifts also without its run
    for source, out in ((run, run / "merged"), (tmp_path / "copied", tmp_path / "out")):
        with quiet():
            model = auto.from_pretrained(export_hf(source, out))
        torch.testing.assert_close(model(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", BESIDE)
def test_an_unmergeable_adapter_is_stored_beside_the_weights(tmp_path: Path, method: str) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), ASK, method=method, std=0.5)
    out = export_hf(run, run / "merged")
    description = describe_folder(out)
    assert f"peft.method={method}" in description and str(out / "adapter") in description and "\n" not in description
    assert ("PeftModel" in description) == (method != "adapter")
    card = json.loads((out / "fedtune.json").read_text())
    assert card["peft"]["method"] == method
    with quiet():
        bare = AutoModelForCausalLM.from_pretrained(out)
        with live.disabled():
            torch.testing.assert_close(bare(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=1e-5)
        if method != "adapter":
            model = PeftModel.from_pretrained(bare, str(out / "adapter"))
            torch.testing.assert_close(model(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=1e-5)
    # fedtune generate uses both
    ids = live.backbone.tokenizer("turn on", return_tensors="pt").input_ids
    tokens = live.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert generate_text(out, "turn on") == live.backbone.tokenizer.decode(tokens[0, 2:], skip_special_tokens=True)
    export_hf(run, out, replace=True)


def test_a_classifiers_head_is_in_the_weights_beside_a_prompt(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m", "roberta")), CLASSES, method="prompt")
    with quiet():
        bare = AutoModelForSequenceClassification.from_pretrained(export_hf(run, run / "merged"))
        model = PeftModel.from_pretrained(bare, str(run / "merged" / "adapter"))
    head: Any = model.base_model.classifier
    assert torch.equal(head.original_module.out_proj.weight, live.parameters["classifier.out_proj.weight"])
    torch.testing.assert_close(model(token_ids()).logits, live.model(token_ids()).logits, rtol=0, atol=1e-5)


def test_a_folder_without_its_run_has_to_be_mergeable(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL, method="prompt")
    shutil.copytree(run / "adapter", tmp_path / "copied")
    with pytest.raises(ModelError, match="peft.method=prompt cannot be merged into weights, and without its run"):
        export_hf(tmp_path / "copied", tmp_path / "out")


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k")
def test_real_weights_merge(tmp_path: Path) -> None:
    run, live = make_run(tmp_path / "run", hub(STORIES), CAUSAL, std=0.02)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(export_hf(run, run / "merged"))
    ids = live.backbone.tokenizer("Once upon a time, there was a dog.", return_tensors="pt").input_ids
    want = live.model(ids).logits  # up to 14; float32 is accurate to about 1e-6 of the largest
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=2e-6 * want.abs().max().item())
    (length,) = struct.unpack("<Q", (run / "merged" / "model.safetensors").read_bytes()[:8])
    assert "lm_head.weight" not in (run / "merged" / "model.safetensors").read_bytes()[8 : 8 + length].decode()  # still tied

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, XGLMConfig

from fedtune.config import ModelConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.models import fingerprint, load_backbone
from fedtune.models.backbone import head_names, pick_device
from fedtune.models.checkpoint import stored_tensors
from tests.models.build import VOCABULARY, checkpoint, hub, llama_config, token_ids, tokenizer

CAUSAL, CLASSES = TaskConfig(kind="causal_lm", max_length=32), TaskConfig(kind="classification", max_length=32)
STORIES = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[2] / "../shared/data")) / "models/stories260k/hf"


def test_a_causal_backbone_is_the_checkpoint_frozen(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    backbone = load_backbone(hub(folder), CAUSAL)
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert torch.equal(backbone.model(token_ids()).logits, AutoModelForCausalLM.from_pretrained(folder)(token_ids()).logits)
    assert (
        backbone.folder == folder
        and backbone.name == backbone.model.config._name_or_path == str(folder)
        and backbone.fingerprint == fingerprint(folder)
    )


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "m", "gpt2")
    capfd.readouterr()
    load_backbone(hub(folder), CLASSES, num_labels=3)  # with a head that the checkpoint lacks
    assert capfd.readouterr() == ("", "")


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    load_backbone(hub(folder), CLASSES, num_labels=3)
    load_backbone(hub(folder, init="random"), CAUSAL)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_embedded_backbone_loads() -> None:
    backbone = load_backbone(ModelConfig(device="cpu"), CAUSAL)
    assert backbone.tokenizer.eos_token_id is not None and len(backbone.fingerprint) == 16


def test_random_weights_follow_the_seed_and_differ_from_the_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    a, b, c = (load_backbone(hub(folder, init="random"), CAUSAL, seed=s) for s in (1, 1, 2))
    x = token_ids()
    assert torch.equal(a.model(x).logits, b.model(x).logits) and a.fingerprint == b.fingerprint
    assert not torch.equal(a.model(x).logits, c.model(x).logits)
    assert len({a.fingerprint, c.fingerprint, fingerprint(folder)}) == 3


def test_random_weights_need_no_weights_on_disk_and_agree_over_precisions(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    full = load_backbone(hub(folder, init="random"), CAUSAL)
    half = load_backbone(hub(folder, init="random", precision="bf16"), CAUSAL)
    assert full.fingerprint == half.fingerprint
    for p, q in zip(full.model.parameters(), half.model.parameters(), strict=True):
        assert q.dtype is torch.bfloat16 and torch.equal(p.bfloat16(), q)


def test_bf16_on_a_cpu_takes_eager_attention(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    half, full = load_backbone(hub(folder, precision="bf16"), CAUSAL), load_backbone(hub(folder), CAUSAL)
    assert half.model.config._attn_implementation == "eager" and full.model.config._attn_implementation == "sdpa"
    assert half.model.dtype is torch.bfloat16 and half.fingerprint == full.fingerprint


# -- fingerprints -----------------------------------------------------------------------------------------------------------------------


def test_the_fingerprint_does_not_depend_on_sharding(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "whole")
    shards = checkpoint(tmp_path / "shards", max_shard_size="4KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert fingerprint(whole) == fingerprint(shards)
    x = token_ids()
    assert torch.equal(load_backbone(hub(whole), CAUSAL).model(x).logits, load_backbone(hub(shards), CAUSAL).model(x).logits)


def test_the_fingerprint_distinguishes_weights_and_configs(tmp_path: Path) -> None:
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", seed=1)
    c = checkpoint(tmp_path / "c")
    raw = json.loads((c / "config.json").read_text())
    (c / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 1e-3}))
    d = checkpoint(tmp_path / "d")
    # these fields do not affect the model
    (d / "config.json").write_text(json.dumps({**raw, "transformers_version": "0", "use_cache": False}))
    assert len({fingerprint(a), fingerprint(b), fingerprint(c)}) == 3 and fingerprint(d) == fingerprint(a)


def test_the_fingerprint_includes_the_first_and_the_last_byte_of_a_large_tensor(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", config=llama_config(hidden_size=64))
    largest = max(stored_tensors(folder), key=lambda t: t.size)
    assert largest.size > 8 * 512  # only parts of it are read
    before, data = fingerprint(folder), largest.file.read_bytes()
    for at in (largest.start, largest.start + largest.size - 1):
        changed = bytearray(data)
        changed[at] ^= 1
        largest.file.write_bytes(changed)
        assert fingerprint(folder) != before


# -- classifiers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_a_missing_head_is_drawn_from_the_seed(tmp_path: Path, kind: str) -> None:
    folder = checkpoint(tmp_path / "m", kind)
    a, b, c = (load_backbone(hub(folder), CLASSES, num_labels=4, seed=s).model for s in (1, 1, 2))
    mask = torch.ones_like(token_ids())
    assert a(token_ids(), attention_mask=mask).logits.shape == (3, 4)
    assert torch.equal(a(token_ids(), attention_mask=mask).logits, b(token_ids(), attention_mask=mask).logits)
    assert not torch.equal(a(token_ids(), attention_mask=mask).logits, c(token_ids(), attention_mask=mask).logits)


def test_a_checkpoint_s_head_is_kept_if_it_fits_and_drawn_if_not(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    trained = load_backbone(hub(folder), CLASSES, num_labels=3, seed=7)
    trained.model.save_pretrained(tmp_path / "c")
    trained.tokenizer.save_pretrained(tmp_path / "c")
    again = load_backbone(hub(tmp_path / "c"), CLASSES, num_labels=3, seed=8)
    assert torch.equal(again.model.get_parameter("score.weight"), trained.model.get_parameter("score.weight"))
    other = load_backbone(hub(tmp_path / "c"), CLASSES, num_labels=5, seed=8)
    fresh = load_backbone(hub(folder), CLASSES, num_labels=5, seed=8)
    head = other.model.get_parameter("score.weight")
    assert head.shape[0] == 5 and torch.equal(head, fresh.model.get_parameter("score.weight"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_classifies_at_the_last_token_with_any_padding(tmp_path: Path, kind: str) -> None:
    backbone = load_backbone(hub(checkpoint(tmp_path / "m", kind)), CLASSES, num_labels=3)
    pad = backbone.tokenizer.pad_token_id
    assert pad == backbone.tokenizer.eos_token_id == backbone.model.config.pad_token_id
    rows = [token_ids(1, n)[0] for n in (2, 5, 9)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    together = backbone.model(ids, attention_mask=mask).logits
    alone = torch.cat([backbone.model(r[None]).logits for r in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_bf16_classifier_keeps_its_head_in_float32(tmp_path: Path) -> None:
    for kind in ("llama", "bert", "roberta"):
        backbone = load_backbone(hub(checkpoint(tmp_path / kind, kind), precision="bf16"), CLASSES, num_labels=3)
        head = next(m for n, m in backbone.model.named_children() if n in ("score", "classifier"))
        assert all(p.dtype is torch.float32 for p in head.parameters())
        assert backbone.model(token_ids()).logits.dtype is torch.float32


def test_a_saved_model_keeps_its_positions_where_the_tokenizer_pads_with_another_token(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "roberta")
    config = json.loads((folder / "config.json").read_text())
    backbone = load_backbone(hub(folder), CLASSES, num_labels=3)
    assert backbone.tokenizer.pad_token_id != 3
    # RoBERTa's first position is pad_token_id + 1: with pad_token_id = 3 the rows start at position 4
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    backbone = load_backbone(hub(folder), CLASSES, num_labels=3)
    backbone.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    ids = token_ids()
    assert torch.equal(again(ids).logits, backbone.model.eval()(ids).logits)


def test_a_decoder_that_numbers_positions_from_its_pad_id_keeps_them_too(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.3}
    config = XGLMConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=3, **sizes)
    folder = checkpoint(tmp_path / "m", config=config)
    before = AutoModelForCausalLM.from_pretrained(folder).eval()
    backbone = load_backbone(hub(folder), TaskConfig(kind="causal_lm", max_length=16))
    assert backbone.tokenizer.pad_token_id != 3
    backbone.model.save_pretrained(tmp_path / "saved")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = token_ids()
    assert torch.equal(before(ids).logits, after(ids).logits) and torch.equal(before(ids).logits, backbone.model.eval()(ids).logits)
    after.config.pad_token_id = backbone.tokenizer.pad_token_id  # the wrong value to save: it changes the positions
    assert not torch.allclose(type(after)(after.config).model.embed_positions.weights, before.model.embed_positions.weights)


# -- encoder-decoders -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_t5_answers_and_classifies_with_the_same_backbone(tmp_path: Path, precision: str) -> None:
    folder = checkpoint(tmp_path / "m", "t5")
    writer = load_backbone(hub(folder, precision=precision), TaskConfig(kind="instruction", max_length=32))
    classifier = load_backbone(hub(folder, precision=precision), CLASSES, num_labels=3)
    assert writer.seq2seq and classifier.seq2seq and not load_backbone(hub(checkpoint(tmp_path / "l")), CAUSAL).seq2seq
    assert head_names(writer.model) == ["lm_head"] and head_names(classifier.model) == ["classification_head"]
    body = dict(classifier.model.base_model.named_parameters())
    assert all(torch.equal(body[n], p) for n, p in writer.model.named_parameters() if n != "lm_head.weight")
    # padding must not look like the end token, at which T5 classifies; its tokenizer has none here, its config has one
    assert classifier.tokenizer.pad_token_id == 2 != classifier.tokenizer.eos_token_id
    rows = [torch.cat([token_ids(1, n)[0], torch.tensor([1])]) for n in (2, 5, 9)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    together = classifier.model(ids, attention_mask=mask).logits
    assert together.dtype is torch.float32 and together.shape == (3, 3)
    if precision == "fp32":
        torch.testing.assert_close(together, torch.cat([classifier.model(r[None]).logits for r in rows]), rtol=0, atol=1e-5)


# -- bad input --------------------------------------------------------------------------------------------------------------------------


def expect_error(config: ModelConfig, words: str, task: TaskConfig = CAUSAL, num_labels: int = 0) -> None:
    with pytest.raises(ModelError, match=words) as bad:
        load_backbone(config, task, num_labels=num_labels)
    assert "\n" not in str(bad.value)


def test_missing_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_error(hub(tmp_path / "nowhere"), "no such folder; give a local folder or a hub name")
    (tmp_path / "file").write_text("x")
    expect_error(hub(tmp_path / "file"), "is a file")
    expect_error(hub(tmp_path), "has no config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expect_error(ModelConfig(source="hub", name="fedtune-nobody/nothing"), "hub cannot be reached")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read as JSON"), ("[]", "no model_type"), ('{"model_type": "martian"}', "architecture 'martian'"),
     ('{"model_type": "t5"}', "'t5' is an encoder-decoder, which does not support task.kind=causal_lm: take classification or instruction"),
     ('{"model_type": "bart"}', r"encoder-decoder \('bart'\): take T5, a decoder, or an encoder for"),
     ('{"model_type": "vit"}', "no model for task.kind=causal_lm"),
     ('{"model_type": "bert"}', "is an encoder, which does not support task.kind=causal_lm"),
     ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid 'llama' config")],
)  # fmt: skip
def test_invalid_configs_are_refused(tmp_path: Path, text: str, words: str) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "config.json").write_text(text)
    expect_error(hub(folder), words)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    raw = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    expect_error(hub(folder), "contains its own code")
    assert not (tmp_path / "ran").exists()


def test_missing_or_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    os.rename(folder / "model.safetensors", tmp_path / "kept")
    expect_error(hub(folder), "has no weights")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    expect_error(hub(folder), r"only pickled weights \(pytorch_model.bin\)")


def test_missing_or_outside_shards_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", max_shard_size="4KB")
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    expect_error(hub(folder), f"lacks the shard {first.name}")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    expect_error(hub(folder), "not a plain file name")
    index.write_text("{}")
    expect_error(hub(folder), "must be JSON with a weight_map")


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for changed, words in (
        (data[:-100], f"it has {len(data) - 100} bytes, its header describes {len(data)}"),
        (data + b"x", f"it has {len(data) + 1} bytes, its header describes {len(data)}"),
        (data[:50], "is not a valid safetensors file"),
        (b"", "is not a valid safetensors file"),
        (b"\xff" * 64, "is not a valid safetensors file"),
    ):
        path.write_bytes(changed)
        expect_error(hub(folder), words)


def test_weights_that_do_not_match_the_config_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    llama_config(num_hidden_layers=3).save_pretrained(folder)
    expect_error(hub(folder), "is missing from")
    llama_config(intermediate_size=32).save_pretrained(folder)
    expect_error(hub(folder), "has another shape in")
    # a pooler of another shape is not a missing pooler: see test_architectures.py
    bare = checkpoint(tmp_path / "b", "bert")
    tensors = load_file(bare / "model.safetensors")
    save_file({**tensors, "pooler.dense.bias": torch.zeros(8)}, bare / "model.safetensors", {"format": "pt"})
    expect_error(hub(bare), "'bert.pooler.dense.bias' has another shape in", CLASSES, 3)


def test_missing_damaged_and_too_large_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    shutil.copytree(folder, tmp_path / "large")
    words = tokenizer()
    words.add_tokens([f"w{i}" for i in range(40)])
    words.save_pretrained(tmp_path / "large")
    expect_error(hub(tmp_path / "large"), "tokens, the model only 32")
    (folder / "tokenizer.json").write_text("{")
    expect_error(hub(folder), "the tokenizer in .* cannot be loaded")
    (folder / "tokenizer.json").unlink()
    expect_error(hub(folder), "has no tokenizer")


def test_tasks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    expect_error(hub(folder), "at least 2 classes", CLASSES, 1)
    expect_error(hub(folder), "task.max_length=65 is more than the context", TaskConfig(kind="causal_lm", max_length=65))
    expect_error(hub(folder), "max_new_tokens=24 is more than the context", TaskConfig(kind="instruction", max_length=41))
    load_backbone(hub(folder), TaskConfig(kind="instruction", max_length=40))
    # RoBERTa counts positions from its padding index, 1: 62 of its 64 are usable
    roberta = checkpoint(tmp_path / "r", "roberta")
    expect_error(hub(roberta), "task.max_length=63", TaskConfig(kind="classification", max_length=63), 3)
    load_backbone(hub(roberta), TaskConfig(kind="classification", max_length=62), num_labels=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path: Path) -> None:
    config = hub(checkpoint(tmp_path / "m"))
    config.device = "cuda"
    expect_error(config, "no CUDA device")


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k")
def test_real_weights_load_as_decoder_and_as_classifier() -> None:
    text = "Once upon a time, there was a little girl named Lily."
    backbone = load_backbone(hub(STORIES), CAUSAL)
    ids = backbone.tokenizer(text, return_tensors="pt").input_ids
    assert backbone.model(ids, labels=ids).loss.item() < 1.5  # the model was trained on such text; an untrained one has ln 512 = 6.2
    classifier = load_backbone(hub(STORIES), CLASSES, num_labels=6)
    assert classifier.model(ids).logits.shape == (1, 6) and classifier.fingerprint == backbone.fingerprint


@pytest.mark.parametrize(
    ("name", "there", "device"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cuda", True, "cuda"), ("cpu", True, "cpu"), ("cpu", False, "cpu")],
)
def test_the_selected_device_follows_the_setting(monkeypatch: pytest.MonkeyPatch, name: str, there: bool, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device(name) == torch.device(device)

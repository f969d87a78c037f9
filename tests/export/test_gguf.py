"""GGUF files, read with the gguf library and run by llama.cpp if it is installed.

llama.cpp is looked for as the module `llama_cpp` of this interpreter, or of the one that FEDTUNE_LLAMA_CPP_PYTHON names.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fedtune.config import ModelConfig, TaskConfig
from fedtune.errors import ModelError
from fedtune.export import gguf as ours
from fedtune.export.gguf import export_gguf
from fedtune.export.gguf_tokens import read_vocabulary
from fedtune.export.huggingface import export_hf
from fedtune.inference.engine.rope import pairs
from fedtune.inference.engine.shape import read_shape
from fedtune.models.backbone import quiet
from tests.export.test_edge_architectures import NEW
from tests.export.test_huggingface import CAUSAL, CLASSES, STORIES, make_run
from tests.inference.engine.tiny import SHAPES, VOCAB
from tests.models.build import checkpoint, hub

gguf = pytest.importorskip("gguf")
BABY = STORIES.parents[1] / "babyllama_tok105/hf"
REAL = {"stories260k": hub(STORIES), "babyllama": hub(BABY), "nano": ModelConfig(device="cpu")}
TEXTS = {
    "stories260k": "Once upon a time, there was a small girl. She had a red ball; it was her best toy!\nOne day she ran to the park.",
    "babyllama": "Once upon a time there was a small girl. She had a red ball and it was her best toy.",
    "nano": 'Turn on the light in the kitchen, then set 21 degrees.\n"What is it?" said the small dog.',
}


def real(name: str) -> ModelConfig:
    model = REAL[name]
    if model.name and not Path(model.name).is_dir():
        pytest.skip(f"{model.name} is missing: set FEDTUNE_DATA")
    return model


@functools.cache
def llama_python() -> str:
    if own := os.environ.get("FEDTUNE_LLAMA_CPP_PYTHON"):
        return own
    if importlib.util.find_spec("llama_cpp"):
        return sys.executable
    pytest.skip("llama.cpp is missing: install llama-cpp-python, or name an interpreter that has it in FEDTUNE_LLAMA_CPP_PYTHON")


RUN = """
import json, sys
import llama_cpp, numpy
path, ask = sys.argv[1], json.loads(sys.argv[2])
model = llama_cpp.Llama(path, n_ctx=ask["context"], n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
ids = model.tokenize(ask["text"].encode(), special=False) if "text" in ask else ask["ids"]
model.eval(ids)
rows = numpy.array(model.scores[: len(ids)], dtype=numpy.float64)
losses = [float(numpy.logaddexp.reduce(r) - r[t]) for r, t in zip(rows[:-1], ids[1:])]
out = []
for _ in range(ask.get("new", 0)):
    out.append(int(numpy.argmax(model.scores[model.n_tokens - 1])))
    model.eval(out[-1:])
print("\\n" + json.dumps({"ids": ids, "new": out, "loss": sum(losses) / max(len(losses), 1), "last": rows[-1].tolist()}))
"""


def llama(path: Path, **ask: Any) -> dict[str, Any]:
    """llama.cpp's tokens of a text, its mean loss on them, its last logits, and its greedy continuation."""
    process = subprocess.run([llama_python(), "-c", RUN, path, json.dumps({"context": 128, **ask})], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


def transformers_results(folder: Path, ids: list[int], new: int = 0) -> tuple[torch.Tensor, float, list[int]]:
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).float()
        given = torch.tensor([ids])
        logits = model(given).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], given[0, 1:]).item()
        out = given
        for _ in range(new):
            out = torch.cat([out, model(out).logits[:, -1:].argmax(-1)], 1)
    return logits[-1], loss, out[0, len(ids) :].tolist()


# -- llama.cpp ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_llama_cpp_has_the_tokens_and_answers_of_transformers(tmp_path: Path, name: str) -> None:
    run, _ = make_run(tmp_path / "run", real(name), CAUSAL, std=0.02)
    merged = export_hf(run, run / "merged")
    with quiet():
        ids = AutoTokenizer.from_pretrained(merged)(TEXTS[name]).input_ids
    wanted, loss, new = transformers_results(merged, ids, 40)
    actual = llama(export_gguf(run, run / "f16.gguf"), text=TEXTS[name], new=40, context=256)
    assert actual["ids"] == ids
    assert actual["new"] == new
    assert abs(actual["loss"] - loss) < 0.002
    for kind, most in (("q8_0", 0.03), ("q4_0", 0.4)):  # nats a token; the models are tiny, and one is trained on other text
        lost = llama(export_gguf(run, run / f"{kind}.gguf", kind=kind), text=TEXTS[name], context=256)["loss"] - loss
        print(f"{name} {kind}: loss {loss:.3f}, {lost:+.3f}")
        assert abs(lost) < most


def byte_level(folder: Path, split: str = "gpt-2") -> None:
    """A byte-level tokenizer of 101 tokens at most."""
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:90], "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def shaped_checkpoint(folder: Path, shape: str) -> Path:
    """A random checkpoint of that shape with a tokenizer that GGUF knows; norms and biases random too."""
    config = SHAPES[shape]()
    config.initializer_range = 0.3
    checkpoint(folder, config=config)
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(folder)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    for old in folder.glob("token*"):
        old.unlink()
    byte_level(folder)
    return folder


SHORT = TaskConfig(kind="causal_lm", max_length=8)
REFUSED = {"llama_yarn_mscale", "qwen3_biases", *NEW}


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted(set(SHAPES) - REFUSED))
def test_llama_cpp_has_the_logits_of_every_shape(tmp_path: Path, shape: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(shaped_checkpoint(tmp_path / "m", shape)), SHORT)
    merged = export_hf(run, run / "merged")
    context = read_shape(json.loads((merged / "config.json").read_text()))
    length = min(context.context, *(w for w in context.windows if w), 40) if any(context.windows) else min(context.context, 40)
    ids = torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(4)).tolist()
    wanted, _, _ = transformers_results(merged, ids)
    actual = torch.tensor(llama(export_gguf(run, run / "m.gguf"), ids=ids)["last"])
    assert (actual - wanted).norm() / wanted.norm() < 0.01  # weights and products in float16


# -- without llama.cpp --------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors as float32 arrays [N, K]."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return {k: f.contents() for k, f in reader.fields.items()}, {n: t for n, t in tensors.items()}


@pytest.mark.parametrize("shape", ["llama", "llama_biases", "llama3", "mistral", "qwen2", "qwen3", "llama_linear", "llama_yarn"])
def test_the_file_holds_the_merged_tensors(tmp_path: Path, shape: str) -> None:
    run, _ = make_run(tmp_path / "run", hub(shaped_checkpoint(tmp_path / "m", shape)), SHORT)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(export_hf(run, run / "merged"))
    metadata, tensors = read(export_gguf(run, run / "m.gguf"))
    arch, config = metadata["general.architecture"], model.config
    own = read_shape(config.to_dict())
    assert arch == {"mistral": "llama"}.get(config.model_type, config.model_type)
    assert (metadata[f"{arch}.block_count"], metadata[f"{arch}.attention.head_count_kv"]) == (own.layers, own.kv_heads)
    assert metadata[f"{arch}.attention.key_length"] == own.head_dim
    parts = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {f"blk.{i}.{a}": f"model.layers.{i}.{b}" for i in range(own.layers) for a, b in parts.items()}
    seen = set()
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        stem, _, part = name.rpartition(".")
        wanted = model.get_parameter(f"{names[stem]}.{part}").detach()
        if arch == "llama" and stem.endswith((".attn_q", ".attn_k")):
            wanted = wanted[pairs(own.heads if stem.endswith("q") else own.kv_heads, own.head_dim)]
        torch.testing.assert_close(tensor, wanted, rtol=2**-10, atol=1e-6, msg=name)
        seen.add(f"{names[stem]}.{part}")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert seen == set(model.state_dict()) - tied
    if (
        shape == "llama3"
    ):  # by hand: 16 / 2π = 2.546 turns in the old context, (2.546 − 1) / 3 = 0.5155 of the way: 1 / (0.5155 + 0.4845 / 8)
        factors = tensors["rope_freqs.weight"]
        assert factors[0] == pytest.approx(1.7359, abs=1e-4) and factors[-1] == pytest.approx(8) and len(factors) == 6
    if shape in ("llama_linear", "llama_yarn"):
        assert metadata[f"{arch}.rope.scaling.type"] == shape[6:] and metadata[f"{arch}.rope.scaling.factor"] == {"llama_linear": 2.5}.get(
            shape, 4
        )
    assert json.loads(metadata["fedtune.card"])["provenance"]["method"] == "lora"


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8.5), ("q4_0", 4.5)])
def test_matrices_are_quantized_if_their_columns_allow(tmp_path: Path, kind: str, bits: float) -> None:
    run, _ = make_run(tmp_path / "run", real("stories260k"), CAUSAL, std=0.02)
    path = export_gguf(run, run / "m.gguf", kind=kind)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"  # 172 columns
    assert types["token_embd.weight"] == "Q8_0"  # the tied output layer gets 8 bits
    assert types["blk.4.attn_q.weight"] == types["blk.0.ffn_up.weight"] == kind.upper()
    assert types["output_norm.weight"] == "F32"
    (_, exact), (_, coarse) = read(export_gguf(run, run / "f16.gguf")), read(path)
    off = (coarse["blk.0.ffn_up.weight"] - exact["blk.0.ffn_up.weight"]).norm() / exact["blk.0.ffn_up.weight"].norm()
    assert 0 < off < 2.0 ** (1.0 - bits) * 3


def test_merges_by_score_give_the_tokens_of_the_merge_list(tmp_path: Path) -> None:
    """llama.cpp's algorithm, which merges by scores, gives the tokens of the tokenizers library, which has a list of merges."""
    real("stories260k")
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(STORIES)
    own = read_vocabulary(STORIES, tokenizer, 512)
    ids = {t: i for i, t in enumerate(own.tokens)}
    assert own.model == "llama" and own.space and own.begins and own.types[:4] == [2, 3, 3, 6]

    def split(text: str) -> list[int]:
        parts = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs_ = [(own.scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ids]
            if not pairs_:
                break
            at = -max(pairs_)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [i for p in parts for i in ([ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()])]

    for text in (TEXTS["stories260k"], "the then there thé", "  two  spaces", "a\tb"):
        assert split(text) == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("split", ["gpt-2", "smollm"])
def test_byte_level_tokenizers_keep_their_merges(tmp_path: Path, split: str) -> None:
    byte_level(tmp_path, split)
    with quiet():
        own = read_vocabulary(tmp_path, AutoTokenizer.from_pretrained(tmp_path), VOCAB)
    assert (own.model, own.pre, own.merges, own.begins) == ("gpt2", split, ["t h", "th e"], False)
    assert own.ids == {"bos": 0, "eos": 1} and own.types[:3] == [3, 3, 1]
    assert own.tokens[94:] == [f"[PAD{i}]" for i in range(94, 101)] and own.types[94:] == [5] * 7


@pytest.mark.parametrize("name", ["my-phi-3-llama", "Phi3x", "modern-bert-qwen"])
def test_no_name_makes_llama_cpp_change_tokens(tmp_path: Path, name: str) -> None:
    """llama.cpp sets flags of tokens by these names, and refuses files without them."""
    metadata, _ = read(export_gguf(shaped_checkpoint(tmp_path / name, "llama"), tmp_path / "m.gguf"))
    result = metadata["general.name"].lower()
    assert result.endswith(name.lower()[-2:]) and not any(known in result for known in ("phi-3", "phi3", "modern-bert"))


def test_a_chat_template_is_exported(tmp_path: Path) -> None:
    folder = shaped_checkpoint(tmp_path / "m", "llama")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    run, _ = make_run(tmp_path / "run", hub(folder), CAUSAL)
    metadata, _ = read(export_gguf(run, run / "m.gguf"))
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}!"


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3], ids=["the header", "a tensor"])
def test_a_failing_write_leaves_no_file_open_or_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    run, _ = make_run(tmp_path / "run", hub(shaped_checkpoint(tmp_path / "m", "llama")), CAUSAL)
    written: list[Any] = []

    def write(writer: Any, tensor: Any) -> None:
        written.append(writer)
        if len(written) > after:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)
    with pytest.raises(ModelError, match="cannot write .*m.gguf: No space left on device"):
        export_gguf(run, tmp_path / "out" / "m.gguf")
    opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    assert written and not [name for name in opened if "m.gguf" in name] and not [*(tmp_path / "out").iterdir()]


# -- refused models -----------------------------------------------------------------------------------------------------------------------


def metaspace(folder: Path) -> None:
    tokenizer = Tokenizer(
        models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4, "bc": 5}, [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", hub(checkpoint(tmp_path / "m")), CAUSAL)
    with pytest.raises(ModelError, match="does not support this WordLevel tokenizer"):
        export_gguf(run, run / "m.gguf")
    assert not list(run.glob("*.gguf")) and not list(run.glob(".m*"))
    byte_level(tmp_path / "odd", "smollm")
    path = tmp_path / "odd" / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    path.write_text(json.dumps(raw))
    with quiet(), pytest.raises(ModelError, match="does not support this tokenizer's pre-tokenizer"):
        read_vocabulary(tmp_path / "odd", AutoTokenizer.from_pretrained(tmp_path / "odd"), VOCAB)
    metaspace(tmp_path / "ranks")
    with quiet(), pytest.raises(ModelError, match="the merges of 'abc' have several ranks"):
        read_vocabulary(tmp_path / "ranks", AutoTokenizer.from_pretrained(tmp_path / "ranks"), VOCAB)


def yarn(folder: Path, **changes: Any) -> Path:
    """A run over a model of YaRN whose rope_parameters are changed."""
    path = shaped_checkpoint(folder / "m", "llama_yarn") / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= changes
    path.write_text(json.dumps(config))
    return make_run(folder / "run", hub(path.parent), SHORT)[0]


def test_a_ramp_of_yarn_that_llama_cpp_would_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="truncate=false"):
        export_gguf(yarn(tmp_path, truncate=False), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_missing_factor_of_yarn_is_computed(tmp_path: Path) -> None:
    metadata, _ = read(export_gguf(yarn(tmp_path, factor=None), tmp_path / "m.gguf"))
    assert (
        metadata["llama.rope.scaling.factor"] == 4 == 64 / metadata["llama.rope.scaling.original_context_length"]
    )  # the model's context is 64


@pytest.mark.slow
def test_models_that_gguf_cannot_express_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape, method, task, message in [
        ("a", "llama", "prompt", CAUSAL, "no place for the virtual tokens of prompt"),
        ("b", "llama_yarn_mscale", "lora", CAUSAL, "YaRN"),
        ("c", "llama", "lora", CLASSES, "is a classifier"),
    ]:
        run, _ = make_run(tmp_path / name, hub(shaped_checkpoint(tmp_path / f"m{name}", shape)), task, method=method)
        with pytest.raises(ModelError, match=message):
            export_gguf(run, run / "m.gguf")
    run, _ = make_run(tmp_path / "d", hub(shaped_checkpoint(tmp_path / "md", "llama")), CAUSAL)
    (run / "m.gguf").write_text("mine")
    with pytest.raises(ModelError, match="already exists"):
        export_gguf(run, run / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'fedtune\[gguf\]'"):
        ours.export_gguf(run, run / "other.gguf")

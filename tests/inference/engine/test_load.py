"""Hugging Face folders and edge packages become engines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.decoder import parameters_held
from fedtune.inference.engine.linear import KINDS, dequantized, portable
from fedtune.inference.engine.load import Engine, load_engine
from fedtune.inference.engine.package import StoredLinear, tensor_shapes
from fedtune.inference.engine.package_writer import PackageWriter
from fedtune.inference.engine.reference.tensors import as_array, as_tensor
from fedtune.inference.engine.shape import Unsupported, read_shape
from tests.inference.engine.tiny import VOCAB, tiny_model

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-5}
IDS = torch.randint(0, VOCAB, (19,), generator=torch.Generator().manual_seed(3))


def logits(engine: Engine, ids: Tensor = IDS, cache: Any = None) -> Tensor:
    span = Span(cache or engine.cache(limit=len(ids)), len(ids), keep=None)
    return torch.from_numpy(engine.decoder.forward(ids.numpy(), [span]))


def theirs(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def round_weight(kind: str, weight: Tensor) -> Tensor:
    """A weight of the kind, dequantized."""
    return torch.from_numpy(dequantized(kind, portable(kind, as_array(weight)), n_in=weight.shape[1]).copy())


def rounded_model(model: Any, kind: str) -> Any:
    """The model with the weights of the kind, dequantized to float32 per linear."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_linear(name):
                own = "int8" if kind == "int4" and name == "lm_head.weight" else kind
                weight.copy_(round_weight(own, weight))
    return model


def write_package_of(folder: Path, name: str, kind: str = "int4", adapters: Any = None, **more: Tensor) -> Any:
    """Write a tiny model as an edge package. Returns the model."""
    model = tiny_model(name, folder.with_name(folder.name + "-hf"))
    config = json.loads((folder.with_name(folder.name + "-hf") / "config.json").read_text())
    folder.mkdir(exist_ok=True)  # the folder may have a tokenizer
    shapes, state = dict(tensor_shapes(read_shape(config))), model.state_dict()
    linears = {
        n.removesuffix(".weight"): StoredLinear(
            kind="int8" if kind == "int4" and n == "lm_head.weight" else kind,  # pyright: ignore[reportArgumentType]
            group=32 if kind == "int4" and n != "lm_head.weight" else 0,
            shape=size,  # pyright: ignore[reportArgumentType]
        )
        for n, size in shapes.items()
        if is_linear(n)
    }
    others = {n: (torch.float32, size) for n, size in shapes.items() if not is_linear(n)}
    writer = PackageWriter(folder, others | {n: (t.dtype, tuple(t.shape)) for n, t in more.items()}, linears)
    for n, tensor in {**{n: state[n] for n in others}, **more}.items():
        writer.put(n, tensor)
    for n, stored in linears.items():
        tensors = portable(stored.kind, as_array(state[f"{n}.weight"]))
        writer.put_linear(n, {part: as_tensor(array) for part, array in tensors.items()})
    for n, factors in (adapters or {}).items():
        writer.put_adapter(n, factors, "base-1")
    writer.close(config, {"task": "causal_lm", "prompt": None, "max_new_tokens": None, "base": "base-1"})
    return model


# bounds relative to the float32 model with the same rounded weights: rounding of activations over three layers
DRIFT = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.04, "int4": 0.03}
NATIVE_DRIFT = DRIFT | {"int4": 0.04}  # native int4 rounds activations to 8 bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama_one_kv", "qwen2_window", "qwen3_biases"])
def test_each_kind_equals_the_model_with_rounded_weights(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name, tmp_path)
    tied = read_shape(model.config.to_dict()).tied
    engine = load_engine(tmp_path, kind)
    wanted = rounded_model(model, kind)
    if tied and kind != "fp32":  # the table stays as it is stored, the head is a rounded copy
        own = "int8" if kind == "int4" else kind
        model.lm_head.weight = torch.nn.Parameter(round_weight(own, model.get_input_embeddings().weight))
    assert relative(logits(engine), theirs(wanted)) < NATIVE_DRIFT[kind]
    monkeypatch.setenv("FEDTUNE_NATIVE", "off")
    assert relative(logits(load_engine(tmp_path, kind)), theirs(wanted)) < DRIFT[kind]
    assert engine.decoder.embedding.dtype == np.float32


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "bf16"), (torch.float32, "fp32")])
def test_without_a_kind_the_stored_format_is_kept(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, dtype=dtype)
    engine = load_engine(tmp_path)
    assert as_tensor(engine.decoder.embedding).dtype == dtype
    assert engine.decoder.head.kind == kind
    assert relative(logits(engine), theirs(model.float())) < DRIFT[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_equals_its_source_folder(kind: str, tmp_path: Path) -> None:
    write_package_of(tmp_path / "edge", "qwen3_biases", kind)
    package, folder = load_engine(tmp_path / "edge"), load_engine(tmp_path / "edge-hf", kind)
    assert torch.equal(logits(package), logits(folder))
    assert parameters_held(package.decoder) == parameters_held(folder.decoder)
    assert package.card["base"] == "base-1" and folder.card == {}


def test_a_quantized_package_opens_dequantized_but_is_not_rounded_again(tmp_path: Path) -> None:
    model = write_package_of(tmp_path / "edge", "llama", "int4")
    torch.testing.assert_close(logits(load_engine(tmp_path / "edge", "fp32")), theirs(rounded_model(model, "int4")), **CLOSE)
    with pytest.raises(ModelError, match="q_proj' in int4, and int8 would round it again"):
        load_engine(tmp_path / "edge", "int8")


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_yarn_mscale"])
@pytest.mark.parametrize("policy", ["full", "window"])
def test_a_package_with_a_prefix_equals_peft(name: str, policy: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model: Any = get_peft_model(tiny_model(name, tmp_path / "x"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    state = model.get_prompt(1)
    k, v = (torch.stack([getattr(layer, part)[0].transpose(0, 1) for layer in state.layers]).detach() for part in ("keys", "values"))
    write_package_of(tmp_path / "edge", name, "fp32", **{"prefix.k": k.contiguous(), "prefix.v": v.contiguous()})
    engine = load_engine(tmp_path / "edge")
    cache = engine.cache(policy, limit=40)
    engine.start(cache)
    assert cache.length == engine.virtual_length == 5
    actual = logits(engine, cache=cache)
    torch.testing.assert_close(actual, theirs(model), **CLOSE)
    assert relative(logits(engine), actual) > 0.1  # the prefix has an effect
    with pytest.raises(ModelError, match="use an empty one"):
        engine.start(cache)


def test_a_package_with_a_prompt_equals_peft(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model: Any = get_peft_model(tiny_model("llama", tmp_path / "x"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    write_package_of(tmp_path / "edge", "llama", "fp32", **{"prompt.embeds": model.get_prompt(1)[0].detach().clone()})
    engine = load_engine(tmp_path / "edge")
    cache = engine.cache(limit=23)
    engine.start(cache)
    assert cache.length == engine.virtual_length == 4
    torch.testing.assert_close(logits(engine, cache=cache), theirs(model)[4:], **CLOSE)  # PEFT also returns the logits of virtual tokens


def test_a_model_without_virtual_tokens_starts_empty(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    engine = load_engine(tmp_path)
    cache = engine.cache(limit=4)
    engine.start(cache)
    assert cache.length == engine.virtual_length == 0


def test_a_packages_adapters_are_loaded_by_name(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = "model.layers.1.self_attn.k_proj"
    a, b = torch.randn(2, 48), torch.randn(24, 2)
    model = write_package_of(tmp_path / "edge", "llama", "fp32", adapters={"kitchen": {module: (a, b)}})
    with torch.no_grad():
        model.get_submodule(module).weight.add_(b @ a)
    engine = load_engine(tmp_path / "edge")
    actual = engine.decoder.forward(IDS.numpy(), [Span(engine.cache(limit=19), 19, keep=None, adapter="kitchen")])
    torch.testing.assert_close(torch.from_numpy(actual), theirs(model), **CLOSE)


def broken(folder: Path, change: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if change == "no config":
        (folder / "config.json").unlink()
    elif change == "no weights":
        weights.unlink()
    elif change == "no json":
        (folder / "config.json").write_text("{")
    elif change == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "endless header":
        weights.write_bytes((2**62).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif change == "other shape":
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 47)
        save_file(tensors, weights)
    elif change == "whole numbers":
        tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int32)
        save_file(tensors, weights)
    elif change == "gap":
        del tensors["model.layers.2.mlp.down_proj.weight"]
        save_file(tensors, weights)
    elif change == "index":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    elif change == "adapter beside":
        (folder / "fedtune.json").write_text('{"peft": {"method": "ia3"}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no config", "config.json cannot be read"),
        ("no weights", "has no weights: it needs model.safetensors"),
        ("no json", "is not JSON"),
        ("cut short", "is not a valid safetensors file"),
        ("endless header", "declares a header of 4611686018427387904 bytes"),
        ("other shape", r"up_proj.weight as F32 \(80, 47\), but config.json requires floats \(80, 48\)"),
        ("whole numbers", "model.norm.weight as I32"),
        ("gap", "has no tensor model.layers.2.mlp.down_proj.weight"),
        ("index", "names the shard .*, which is not a plain file name"),
        ("adapter beside", "has an unmerged adapter"),
    ],
)
def test_a_damaged_folder_gives_a_one_sentence_error(change: str, message: str, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    broken(tmp_path, change)
    with pytest.raises(ModelError, match=message) as caught:
        load_engine(tmp_path, "int4")
    assert "\n" not in str(caught.value)


def test_unknown_kinds_and_architectures_are_refused(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    with pytest.raises(ModelError, match="no kind 'int3'"):
        load_engine(tmp_path, "int3")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(Unsupported, match="gpt2"):
        load_engine(tmp_path)


REAL = Path(os.environ.get("FEDTUNE_DATA", "/nowhere")) / "models"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs FEDTUNE_DATA")
@pytest.mark.parametrize("name", ["stories260k", "babyllama_tok105"])
def test_real_weights_give_the_same_greedy_tokens(name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = REAL / name / "hf"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    engine = load_engine(folder)
    begin = torch.tensor([1, 5, 9, 17])
    with torch.no_grad():
        want = model.generate(begin[None], max_new_tokens=60, min_new_tokens=60, do_sample=False)[0, 4:]
    cache, ids, results = engine.cache(), begin.tolist(), []
    for _ in range(60):
        logits = engine.decoder.forward(ids, [Span(cache, len(ids))])
        logits[:, list(engine.shape.eos)] = -np.inf
        ids = logits.argmax(-1).tolist()
        results += ids
    assert results == want.tolist()


MEMORY = """
import resource, sys
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.decoder import parameters_held
from fedtune.inference.engine.threads import set_threads
set_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tiny = load_engine(sys.argv[2], sys.argv[3])  # loads kernels and tables before the measurement
before = peak()
engine = load_engine(sys.argv[1], sys.argv[3])
print(peak() - before, sum(parameters_held(engine.decoder).values()) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_loading_needs_little_more_than_the_packed_weights(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "large")
    tiny_model("llama", tmp_path / "tiny")
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(tmp_path / "tiny"), kind]
    process = subprocess.run(arguments, capture_output=True, text=True, check=True)
    grown, packed = map(float, process.stdout.split())
    layer = (4 * 768 * 768 + 3 * 768 * 2048) * 4 / 2**20  # MiB of a float32 layer, which packing needs
    assert grown < packed + 3 * layer  # the whole model in float32 is 12 layers and two tables of 23 MB

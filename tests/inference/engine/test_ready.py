"""Weights are packed once, then memory-mapped."""

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.errors import ModelError
from fedtune.inference.engine import make_linear, ready
from fedtune.inference.engine.linear import KINDS, Native, portable
from fedtune.inference.engine.load import load_engine
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.native.choice import why_torch
from fedtune.inference.engine.reference import linears
from fedtune.inference.engine.reference.linears import Int8, apply
from fedtune.inference.engine.reference.opaque import can_wrap, layout_of, raw_bytes, wrap_bytes
from tests.inference.engine.test_load import logits, write_package_of
from tests.inference.engine.tiny import tiny_model

pytestmark = pytest.mark.skipif(not can_wrap(), reason="this torch cannot map packed weights")


@pytest.fixture(autouse=True)
def _cache_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ready, "LEAST", 0)


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "fedtune" / "ready").glob("*/weights.bin"))


def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(*_: object) -> dict[str, object]:
        raise AssertionError("packed again")

    for module in (make_linear, linears):
        monkeypatch.setattr(module, "pack", pack)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize(("n_out", "n_in"), [(37, 45), (192, 172), (1, 33), (128, 64)])
def test_a_packed_weight_is_its_bytes_and_its_layout(kind: str, n_out: int, n_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_NATIVE", "off")  # torch's kernels, which use oneDNN's layout
    torch.manual_seed(n_in)
    packed_linear = linear_from_tensors(kind, portable(kind, torch.randn(n_out, n_in).numpy()), n_in=n_in)
    if not packed_linear.parts.get("packed", torch.ones(1)).is_mkldnn:
        pytest.skip("this CPU multiplies plain bfloat16")
    packed = packed_linear.parts["packed"]
    memory = raw_bytes(packed).clone()
    again = type(packed_linear)(
        {**packed_linear.parts, "packed": wrap_bytes(memory, layout_of(packed), packed.shape, packed.dtype)}, n_in=n_in, n_out=n_out
    )
    for rows in (1, 5, 130):
        x = torch.randn(rows, n_in)
        assert torch.equal(apply(packed_linear, x), apply(again, x))
    assert torch.ops.mkldnn.data_ptr(again.parts["packed"]) == memory.data_ptr()  # wrapped, not copied


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_is_packed_once_and_gives_the_same_answers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package_of(tmp_path / "edge", "qwen3_biases", kind)
    wanted = logits(load_engine(tmp_path / "edge", keep=False))
    assert not cache_files(tmp_path)
    assert torch.equal(logits(load_engine(tmp_path / "edge")), wanted)
    assert len(cache_files(tmp_path)) == 1
    no_packing(monkeypatch)
    engine = load_engine(tmp_path / "edge")
    assert torch.equal(logits(engine), wanted) and engine.decoder.head.mapped is not None


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_folder_quantized_on_loading_is_packed_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen2_window", tmp_path / "hf")
    wanted = logits(load_engine(tmp_path / "hf", kind))
    assert len(cache_files(tmp_path)) == 1
    load_engine(tmp_path / "hf", "fp32")
    assert len(cache_files(tmp_path)) == 1  # the second load maps this file
    no_packing(monkeypatch)
    assert torch.equal(logits(load_engine(tmp_path / "hf", kind)), wanted)


def test_a_cache_of_another_source_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package_of(tmp_path / "edge", "llama", "int8")
    load_engine(tmp_path / "edge")
    (first,) = cache_files(tmp_path)
    written_ns = first.stat().st_mtime_ns
    os.utime(tmp_path / "edge" / "weights-int8.safetensors", ns=(1, 1))  # as after another export
    load_engine(tmp_path / "edge")
    (second,) = cache_files(tmp_path)
    assert second == first and second.stat().st_mtime_ns > written_ns
    for change, name, value in (
        ("cpu_features", "cpu", [platform.machine(), "another", "fast"]),
        ("packing", "native", ["int8 0"]),
        ("_torch_version", "torch", "9.9.0"),  # the version of torch matters if torch runs a kind
    ):
        made = frozenset(value[1:]) if change == "cpu_features" else value
        monkeypatch.setattr(ready, change, lambda made=made: made)
        written_ns = first.stat().st_mtime_ns
        load_engine(tmp_path / "edge")
        assert json.loads((first.parent / "index.json").read_text())["made_from"][name] == value
        assert first.stat().st_mtime_ns > written_ns


@pytest.mark.parametrize("damage", ["no index", "no JSON", "layout", "cut short", "offset", "sealed offset", "sealed dtype", "sealed size"])
@pytest.mark.parametrize("native", ["off", ""])
def test_a_damaged_cache_is_rebuilt(native: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_NATIVE", native)
    write_package_of(tmp_path / "edge", "llama", "int8")
    wanted = logits(load_engine(tmp_path / "edge"))
    (weights,) = cache_files(tmp_path)
    index = weights.with_name("index.json")
    document = json.loads(index.read_text())
    if damage == "no index":
        index.unlink()
    elif damage == "no JSON":
        index.write_text("[1")
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        if damage == "layout" and document["layouts"]:
            document["layouts"][0] = "ff" + document["layouts"][0][2:]
        else:
            head = document["linears"]["head"]
            part = next(iter(head["parts"].values()))
            if damage == "sealed dtype":
                part["dtype"] = 1.5
            elif damage == "sealed size":
                head["n_out"] += 1
            else:
                part["at"] = 1 << 40 if damage == "offset" else 1
            if damage.startswith("sealed"):
                document["seal"] = ready._seal(document["linears"], document["layouts"], document["size"])
        index.write_text(json.dumps(document))
    assert torch.equal(logits(load_engine(tmp_path / "edge")), wanted)
    again = json.loads(index.read_text())
    head = again["linears"]["head"]
    assert all(part["at"] % 64 == 0 and part["at"] < again["size"] and part["dtype"] != 1.5 for part in head["parts"].values())
    assert head["n_out"] == load_engine(tmp_path / "edge").shape.vocab


def test_weights_packed_for_other_kernels_are_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package_of(tmp_path / "edge", "llama", "int4")
    native = load_engine(tmp_path / "edge").decoder.head
    if not isinstance(native, Native):
        pytest.skip(str(why_torch("int4")))
    monkeypatch.setenv("FEDTUNE_NATIVE", "off")
    assert isinstance(load_engine(tmp_path / "edge").decoder.head, Int8)
    monkeypatch.setenv("FEDTUNE_NATIVE", "portable")  # every instruction set reads the same layout
    load_engine(tmp_path / "edge")
    (weights,) = cache_files(tmp_path)
    written_ns = weights.stat().st_mtime_ns
    monkeypatch.delenv("FEDTUNE_NATIVE")
    assert isinstance(load_engine(tmp_path / "edge").decoder.head, Native) and weights.stat().st_mtime_ns == written_ns


def test_an_unwritable_disk_is_reported_and_the_model_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_package_of(tmp_path / "edge", "llama", "int4")
    (tmp_path / "cache").write_text("a file, no folder")
    with caplog.at_level(logging.WARNING):
        engine = load_engine(tmp_path / "edge")
    assert "the model is packed again at each start" in caplog.text and logits(engine).shape[0] == 19


def test_the_cache_of_a_deleted_folder_is_deleted(tmp_path: Path) -> None:
    write_package_of(tmp_path / "one", "llama", "int4")
    load_engine(tmp_path / "one")
    (old,) = cache_files(tmp_path)
    (tmp_path / "one").rename(tmp_path / "two")
    load_engine(tmp_path / "two")
    assert len(cache_files(tmp_path)) == 1 and cache_files(tmp_path) != [old]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_package_of(tmp_path / "edge", "llama", "int4")
    (tmp_path / "edge" / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json is missing"):
        load_engine(tmp_path / "edge")


def test_small_models_are_packed_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "LEAST", 1 << 26)
    write_package_of(tmp_path / "edge", "llama", "int4")
    assert load_engine(tmp_path / "edge").decoder.head.mapped is None and not cache_files(tmp_path)


OPEN = """
import sys
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import load_engine
def anonymous():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) << 10, int(status["RssFile"].split()[0]) << 10
before = anonymous()
engine = load_engine(*sys.argv[1:])
opened = anonymous()
engine.decoder.forward(range(2), [Span(engine.cache(limit=8), 2)])
weights = sum(linear.nbytes for layer in engine.decoder.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down))
print(opened[0] - before[0], opened[1] - before[1], anonymous()[0] - before[0], anonymous()[1] - opened[1], weights)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_mapped_weights_are_read_on_use(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=1024, intermediate_size=6144, num_hidden_layers=3, num_attention_heads=16)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    results = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", OPEN, str(tmp_path / "hf"), kind], capture_output=True, text=True, check=True, timeout=120
        )
        results.append([int(number) for number in process.stdout.split()])
    own, mapped, used, paged_in, weights = results[1]
    assert own < 0.1 * weights and mapped < 0.5 * weights  # nothing is packed and hardly anything is read yet
    assert used < 0.3 * weights and paged_in > 0.9 * weights  # a pass reads all weights and copies none

import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedtune.errors import ModelError
from fedtune.inference.engine.package import Kind, StoredLinear, is_linear, is_package, linear_tensors, read_package, tensor_shapes
from fedtune.inference.engine.package_writer import PackageWriter, TensorFile
from fedtune.inference.engine.reference.tensors import as_tensor
from fedtune.inference.engine.shape import Shape, canonical, read_shape
from fedtune.models.backbone import quiet
from tests.inference.engine.tiny import SHAPES
from tests.inference.sealing import seal_again

CARD = {"task": "causal_lm", "prompt": None, "max_new_tokens": None, "base": "0123456789abcdef"}


def config_of(name: str) -> dict[str, Any]:
    return {**SHAPES[name]().to_dict(), "architectures": None}


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_tensors_is_the_model_s(name: str) -> None:
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name]())
    own = {canonical(n): tuple(p.shape) for n, p in model.named_parameters()}  # a tied head is stored once
    own = {n: size for n, size in own.items() if not n.startswith(("model.vision_tower", "model.multi_modal_projector"))}
    assert dict(tensor_shapes(read_shape(config_of(name)))) == own


def write(folder: Path, name: str = "llama", kind: Kind = "int4", virtual: str = "") -> dict[str, Tensor]:
    """Write a package of random tensors. Returns the tensors."""
    folder.mkdir()
    config = config_of(name)
    shape, generator = read_shape(config), torch.Generator().manual_seed(0)
    group = {"int4": 32}.get(kind, 0)
    sizes = dict(tensor_shapes(shape))
    linears = {
        n.removesuffix(".weight"): StoredLinear(kind="int8" if n == "lm_head.weight" else kind, group=0 if n == "lm_head.weight" else group,
                                                shape=(s[0], s[1]))
        for n, s in sizes.items() if is_linear(n)
    }  # fmt: skip
    specs = {n: (torch.bfloat16 if len(s) == 2 else torch.float32, s) for n, s in sizes.items() if not is_linear(n)}
    if virtual == "prompt":
        specs["prompt.embeds"] = (torch.float32, (4, shape.hidden))
    if virtual == "prefix":
        specs |= {f"prefix.{x}": (torch.float32, (shape.layers, 3, shape.kv_heads, shape.head_dim)) for x in "kv"}
    writer, out = PackageWriter(folder, specs, linears), {}
    for n, (dtype, s) in specs.items():
        out[n] = torch.randn(s, generator=generator).to(dtype)
        writer.put(n, out[n])
    for n, linear in reversed(linears.items()):  # in any order
        made = {p: _random(d, s, generator) for p, (d, s) in linear_tensors(n, linear).items()}
        writer.put_linear(n, {p.rpartition(".")[2]: t for p, t in made.items()})
        out |= made
    module = "model.layers.1.self_attn.q_proj"
    factors = {module: (torch.randn(2, shape.hidden, generator=generator), torch.randn(sizes[f"{module}.weight"][0], 2))}
    writer.put_adapter("mine", factors, str(CARD["base"]))
    writer.close(config, CARD)
    return out


def _random(stored: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}[stored]
    if dtype.is_floating_point:
        return torch.rand(size, generator=generator).to(dtype)
    return torch.randint(-100 if dtype == torch.int8 else 0, 100, size, generator=generator).to(dtype)


@pytest.mark.parametrize(("name", "kind", "virtual"), [("llama", "int4", ""), ("qwen2", "int8", "prompt"), ("qwen3", "bf16", "prefix")])
def test_a_package_round_trips(tmp_path: Path, name: str, kind: Kind, virtual: str) -> None:
    expected = write(tmp_path / "p", name, kind, virtual)
    package = read_package(tmp_path / "p")
    assert is_package(tmp_path / "p") and not is_package(tmp_path)
    assert set(package.tensors) == set(expected)
    for n, tensor in expected.items():
        assert torch.equal(as_tensor(package.tensors[n]), tensor), n
    assert package.card == CARD and package.shape == read_shape(config_of(name))
    parts = {"int4": {"packed", "scale", "zero"}, "int8": {"packed", "scale"}}.get(kind, {"weight"})
    assert set(package.linear("model.layers.0.self_attn.k_proj")) == parts | ({"bias"} if name == "qwen2" else set())
    (a, b) = package.adapters["mine"]["model.layers.1.self_attn.q_proj"]
    assert a.shape == (2, package.shape.hidden) and b.shape == (package.shape.heads * package.shape.head_dim, 2)


def test_any_program_reads_the_files_and_they_are_aligned(tmp_path: Path) -> None:
    expected = write(tmp_path / "p")
    for path in (tmp_path / "p").glob("weights-*.safetensors"):
        for n, tensor in load_file(path).items():
            assert torch.equal(tensor, expected.pop(n))
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert (8 + length) % 64 == 0
    assert not expected


def test_tensors_used_together_are_stored_together(tmp_path: Path) -> None:
    write(tmp_path / "p", kind="bf16")
    raw = (tmp_path / "p" / "weights-bf16.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    offsets = {n: t["data_offsets"] for n, t in json.loads(raw[8 : 8 + length]).items() if n != "__metadata__"}
    for layer in range(3):
        for together in (["self_attn.q", "self_attn.k", "self_attn.v"], ["mlp.gate", "mlp.up"]):
            mine = [offsets[f"model.layers.{layer}.{n}_proj.weight"] for n in together]
            assert all(a[1] == b[0] for a, b in zip(mine, mine[1:], strict=False))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6), st.randoms())
def test_tensors_may_be_written_in_any_order(tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], rng: Any) -> None:
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.uint8]
    specs = {f"t{i}": (dtypes[i % 4] if i < 4 else torch.float32, tuple(s)) for i, s in enumerate(sizes)}
    specs = dict(sorted(specs.items(), key=lambda kv: -kv[1][0].itemsize))  # larger entries first: all aligned, as in a file of one dtype
    expected = {n: torch.randint(0, 90, s).to(d) for n, (d, s) in specs.items()}
    file = TensorFile(path, specs)
    for name in sorted(expected, key=lambda _: rng.random()):
        file.put(name, expected[name])
    file.close()
    tensors = load_file(path)
    assert set(tensors) == set(expected) and all(torch.equal(tensors[n], t) for n, t in expected.items())


def change(folder: Path, file: str, **tensors: Tensor | None) -> None:
    path = folder / f"weights-{file}.safetensors"
    stored_tensors = {**load_file(path), **tensors}
    save_file({n: t for n, t in stored_tensors.items() if t is not None}, path)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_entry(folder: Path, **entry: Any) -> None:
    card = json.loads((folder / "package.json").read_text())
    card["linears"]["model.layers.0.mlp.up_proj"] |= entry
    edit(folder / "package.json", linears=card["linears"])


def foreign_adapter(folder: Path, **tensors: Tensor) -> None:
    save_file(tensors, folder / "adapters" / "x.safetensors", {"fedtune": json.dumps({"base": CARD["base"]})})


NORM, SCALE = "model.norm.weight", "model.layers.0.mlp.up_proj.weight.scale"
UP = "model.layers.0.mlp.up_proj"
BAD = {
    "no card": (lambda p: (p / "fedtune.json").unlink(), "fedtune.json is missing: give a folder that"),
    "card": (lambda p: edit(p / "fedtune.json", prompt=3), "the card's prompt is '3', which is not of type"),
    "another format": (lambda p: edit(p / "package.json", format=1), "has the format 1, but this fedtune reads 2"),
    "a list": (lambda p: (p / "package.json").write_text("[]"), "must hold a JSON object"),
    "deep": (lambda p: (p / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "large": (lambda p: (p / "config.json").write_text(" " * (1 << 24) + "{}"), "is larger than the limit of 16 MB"),
    "layers": (lambda p: edit(p / "config.json", num_hidden_layers=900), "requires 900 layers, more than the package has tensors"),
    "more layers": (lambda p: edit(p / "config.json", num_hidden_layers=4), "does not list the linears that config.json requires"),
    "kind": (lambda p: change_entry(p, kind="int3"), "which does not fit"),
    "group": (lambda p: change_entry(p, group=33), "which does not fit"),
    "int8 in groups": (lambda p: change_entry(p, kind="int8", group=32), "'group': 32, .*which does not fit"),
    "another kind": (lambda p: change_entry(p, kind="bf16", group=0), "lacks the tensor 'model.layers.0.mlp.up_proj.weight'"),
    "missing": (lambda p: change(p, "f32", **{NORM: None}), f"lacks the tensor '{NORM}'"),
    "surplus": (lambda p: change(p, "f32", extra=torch.ones(1)), "holds 'extra', which its config does not have"),
    "shape": (lambda p: change(p, "f32", **{NORM: torch.ones(3)}), f"'{NORM}' is float32 \\(3,\\), but its config requires"),
    "dtype": (lambda p: change(p, "f32", x=torch.ones(3).bfloat16()), "'x' is BF16, which does not belong in this file"),
    "twice": (lambda p: change(p, "bf16", **{NORM: torch.ones(48).bfloat16()}), f"holds '{NORM}' twice"),
    "nan": (lambda p: change(p, "f32", **{NORM: torch.full((48,), torch.nan)}), f"'{NORM}' holds numbers that are not finite"),
    "scale": (lambda p: change(p, "bf16", **{SCALE: torch.full((80, 2), torch.inf).bfloat16()}), f"'{SCALE}' holds numbers that are not"),
    "virtual": (lambda p: change(p, "f32", **{"prompt.embeds": torch.ones(3, 47)}), r"'prompt.embeds' is float32 \(3, 47\)"),
    "half a prefix": (lambda p: change(p, "f32", **{"prefix.k": torch.ones(3, 2, 2, 12)}), "lacks the tensor 'prefix.v'"),
    "other file": (lambda p: shutil.copyfile(p / "weights-f32.safetensors", p / "weights-f16.safetensors"), "is not a file of a package"),
    "header": (lambda p: (p / "weights-int8.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}"), "declares a header of 10995116"),
    "adapter's module": (
        lambda p: foreign_adapter(p, **{"y.lora_A": torch.ones(1, 2), "y.lora_B": torch.ones(2, 1)}), "factors of 'y' do not fit"
    ),
    "half an adapter": (lambda p: foreign_adapter(p, **{f"{UP}.lora_A": torch.ones(1, 48)}), f"the factors of '{UP}' do not fit"),
    "adapter's rank": (
        lambda p: foreign_adapter(p, **{f"{UP}.lora_A": torch.ones(0, 48), f"{UP}.lora_B": torch.ones(80, 0)}), "do not fit the decoder"
    ),
    "adapter's numbers": (
        lambda p: foreign_adapter(p, **{f"{UP}.lora_A": torch.ones(1, 48), f"{UP}.lora_B": torch.full((80, 1), torch.nan)}),
        "hold numbers that are not finite",
    ),
    "adapter of nothing": (lambda p: foreign_adapter(p, x=torch.ones(1)), "do not fit the decoder"),
    "adapter of nobody": (lambda p: save_file({}, p / "adapters" / "x.safetensors"), "its metadata does not name a backbone"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_package_gives_a_one_sentence_error(tmp_path: Path, name: str) -> None:
    write(tmp_path / "p")
    spoil, message = BAD[name]
    spoil(tmp_path / "p")
    with suppress(ValueError, TypeError, RecursionError):  # package.json itself may be damaged
        seal_again(tmp_path / "p")
    with pytest.raises(ModelError, match=message) as bad:
        read_package(tmp_path / "p")
    assert "\n" not in str(bad.value)


@pytest.mark.parametrize("stem", ["config.json", "weights-f32.safetensors", "weights-bf16.safetensors", "weights-int4.safetensors"])
def test_a_flipped_bit_is_detected_in_every_file_of_the_export(tmp_path: Path, stem: str) -> None:
    write(tmp_path / "p")
    raw = bytearray((tmp_path / "p" / stem).read_bytes())
    raw[-3] ^= 1
    (tmp_path / "p" / stem).write_bytes(raw)
    with pytest.raises(ModelError, match=f"{stem} (has another digest than after the export|cannot be read)"):
        read_package(tmp_path / "p")
    if stem != "config.json":
        read_package(tmp_path / "p", seen=True)  # packed weights are not read again


def test_added_and_missing_files_are_detected(tmp_path: Path) -> None:
    write(tmp_path / "p")
    (tmp_path / "p" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="one is missing or was added"):
        read_package(tmp_path / "p")


def shape_of(name: str) -> Shape:
    return read_shape(config_of(name))


def test_a_tied_decoder_has_no_separate_head() -> None:
    assert shape_of("qwen2").tied and "lm_head.weight" not in dict(tensor_shapes(shape_of("qwen2")))

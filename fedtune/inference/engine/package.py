"""The edge package: a folder with a decoder for the engine, its tokenizer, and a card with its provenance.

    config.json  tokenizer files    in Hugging Face's format
    fedtune.json                    the card: task, prompt template, provenance, metric, privacy, quantization
    package.json                    {"format": 2, "linears": {name: {"kind", "group", "shape"}}, "sha256": {file: digest}}
    weights-{f32,bf16,int8,int4}.safetensors    one file per dtype
    adapters/NAME.safetensors       separate LoRA factors, selected per request

Tensors have their Hugging Face names. A quantized linear's weight is `<name>.weight.packed` with `.scale` and, int4, `.zero`, as in
`fedtune.inference.quantize.rtn`. Query, key and value of a layer are adjacent in their file, and so are gate and up. Virtual tokens are
`prompt.embeds` [t, d], or `prefix.k` and `prefix.v` [L, t, Hkv, D], with keys as in the cache: they are not rotated.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import Array, as_float32
from fedtune.inference.engine.layout import linears, norm_sizes
from fedtune.inference.engine.shape import Shape, read_shape
from fedtune.storage.parsing import parse_json, read_text
from fedtune.storage.reading import read_fields
from fedtune.storage.tensor_files import StoredTensor, read_header

__all__ = [
    "ADAPTERS",
    "FORMAT",
    "PACKAGE",
    "Package",
    "StoredLinear",
    "digest",
    "is_package",
    "linear_tensors",
    "read_package",
    "sealed",
    "tensor_shapes",
]

FORMAT = 2
PACKAGE, CARD, ADAPTERS = "package.json", "fedtune.json", "adapters"
FILES = {"F32": "weights-f32", "BF16": "weights-bf16", "I8": "weights-int8", "U8": "weights-int4"}  # dtype → file
Floats = NDArray[np.float32]
Kind = Literal["fp32", "bf16", "int8", "int4"]
_NAMES = {"F32": "float32", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}
_JSON = 1 << 24  # limit in bytes, far above our files: parsing takes several times as much memory


@dataclass(frozen=True, kw_only=True)
class _Card:
    """The fields of the card that the engine uses; the others are for people."""

    task: str
    base: str
    prompt: str | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
    """The storage format of a linear's weight [N, K]. `group`: columns per int4 scale; 0 for other kinds (int8 has one scale per row)."""

    kind: Kind
    group: int
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package whose files are checked and mapped; matrices are read from disk on use.

    Attributes:
        config: config.json.
        shape: Parsed from `config`.
        card: fedtune.json.
        linears: Name without `.weight` → storage format.
        tensors: Name → tensor, mapped on each request: its pages are freed with the tensor. Do not change them.
        adapters: Name → module → A [r, K] and B [N, r], float32; y += x Aᵀ Bᵀ, with the scaling in B.
    """

    folder: Path
    config: dict[str, Any]
    shape: Shape
    card: dict[str, Any]
    linears: Mapping[str, StoredLinear]
    tensors: "StoredTensors"
    adapters: Mapping[str, Mapping[str, tuple[Floats, Floats]]] = field(default_factory=dict)

    def linear(self, name: str) -> dict[str, Array]:
        """The tensors of a linear: `weight`, or `packed`, `scale` and (int4) `zero`; and `bias` if it has one."""
        parts = {"weight": "weight", "weight.packed": "packed", "weight.scale": "scale", "weight.zero": "zero", "bias": "bias"}
        return {short: self.tensors[f"{name}.{part}"] for part, short in parts.items() if f"{name}.{part}" in self.tensors.specs}


class StoredTensors(Mapping[str, Array]):
    """Tensors of safetensors files by name, each memory-mapped on request.

    Attributes:
        specs: Name → dtype and shape, from the files' headers.
    """

    def __init__(self) -> None:
        self.specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._stored: dict[str, StoredTensor] = {}

    def add(self, path: Path, dtype: str) -> dict[str, str]:
        """Add a file whose tensors must all have this dtype; returns its metadata.

        Raises:
            ModelError: The file is damaged, has a tensor of another dtype, or has one that is in another file too.
        """
        found, metadata = read_header(path)
        for name, stored in found.items():
            if stored.dtype != dtype:
                raise ModelError(f"{path}: '{name:.80}' is {stored.dtype}, which does not belong in this file: the package is damaged")
            if name in self._stored:
                raise ModelError(f"{path.parent} holds '{name:.80}' twice: export the model again")
            self._stored[name], self.specs[name] = stored, (dtype, stored.shape)
        return metadata

    def __getitem__(self, name: str) -> Array:
        return self._stored[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def is_package(folder: Path) -> bool:
    """Whether the folder holds an edge package, possibly a damaged one."""
    return (folder / PACKAGE).is_file()


def sealed(name: str) -> bool:
    """Whether package.json holds the digest of a file of this name; other files (card, chat template, adapters) may be edited by hand."""
    return name in ("config.json", "tokenizer.json") or name.startswith("weights-")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_package(folder: Path, *, seen: bool = False) -> Package:
    """Open and check a package.

    Names, shapes, dtypes and sizes must match its config. Scales, norms, biases, virtual tokens and adapters must be finite. Files must
    have the stored digests.

    Args:
        folder: The package.
        seen: Whether the same weight files were checked before; then they are not read again.

    Raises:
        ModelError: A file is missing or damaged, or the files do not match.
    """
    folder = Path(folder)
    config, card, listed = (read_object(folder / name) for name in ("config.json", CARD, PACKAGE))
    _check_card(card, folder / CARD)
    shape = read_shape(config)
    if listed.get("format") != FORMAT:
        raise ModelError(
            f"{folder / PACKAGE} has the format {listed.get('format')!r:.40}, but this fedtune reads {FORMAT}: export it again"
        )
    tensors = StoredTensors()
    for path in sorted(folder.glob("weights-*.safetensors")):
        dtype = next((d for d, stem in FILES.items() if stem == path.stem), None)
        if dtype is None:
            raise ModelError(f"{path} is not a file of a package: remove it, or export the model again")
        tensors.add(path, dtype)
    _check_seal(folder, listed.get("sha256"), seen)
    if shape.layers > len(tensors):  # before building a table of all layers
        raise ModelError(f"{folder / 'config.json'} requires {shape.layers} layers, more than the package has tensors: export it again")
    linears = _linears(listed.get("linears"), shape, folder / PACKAGE)
    _check(folder, shape, linears, tensors, seen)
    paths = sorted((folder / ADAPTERS).glob("*.safetensors"))
    adapters = {path.stem: _adapter(path, shape, card.get("base")) for path in paths}
    return Package(folder=folder, config=config, shape=shape, card=card, linears=linears, tensors=tensors, adapters=adapters)


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The decoder's tensors and their shapes, in the order of a package's files; no `lm_head.weight` if it is tied."""
    d, fused, norms = shape.hidden, linears(shape), norm_sizes(shape)
    queries = [f"self_attn.{x}_norm" for x in "qk" if shape.qk_norm]
    yield "model.embed_tokens.weight", (shape.vocab, d)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for place in ("norm", "qkv", "o", "o_norm", "mlp_norm", "gate_up", "down", "down_norm"):
            if place in fused:
                yield from ((f"{at}.{part.module}.weight", (part.rows, fused[place].columns)) for part in fused[place].parts)
                yield from ((f"{at}.{part.module}.bias", (part.rows,)) for part in fused[place].parts if fused[place].bias)
            names = queries if place == "qkv" else [shape.norms[place]] if place in shape.norms else []
            yield from ((f"{at}.{name}.weight", (norms[name],)) for name in names)
    yield "model.norm.weight", (d,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, d)


def linear_tensors(name: str, linear: StoredLinear) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that store a linear's weight: name → dtype and shape."""
    (rows, columns), weight = linear.shape, f"{name}.weight"
    if linear.kind in ("fp32", "bf16"):
        return {weight: ("F32" if linear.kind == "fp32" else "BF16", (rows, columns))}
    if linear.kind == "int8":
        return {f"{weight}.packed": ("I8", (rows, columns)), f"{weight}.scale": ("F32", (rows,))}
    groups = (rows, math.ceil(columns / linear.group))
    packed = {f"{weight}.packed": ("U8", (rows, math.ceil(columns / 2)))}
    return packed | {f"{weight}.{part}": ("BF16", groups) for part in ("scale", "zero")}


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ModelError: It is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > _JSON:
            raise ModelError(f"{path} is larger than the limit of {_JSON >> 20} MB: it is damaged")
        found = parse_json(read_text(path))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: give a folder that `fedtune export --to edge` wrote") from None
    except (OSError, ValueError, RecursionError) as bad:
        raise ModelError(f"{path} cannot be read as JSON ({str(bad)[:80]}): it is damaged") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object: it is damaged")
    return found


def _check_card(card: dict[str, Any], path: Path) -> None:
    try:
        read_fields(_Card, card, ValueError, "card", others=True)
    except ValueError as bad:
        raise ModelError(f"{path} is invalid: {bad}; export the model again") from None


def _linears(entries: Any, shape: Shape, path: Path) -> dict[str, StoredLinear]:
    """Parse the decoder's linears from package.json; a tied head has no entry."""
    sizes = {n.removesuffix(".weight"): s for n, s in tensor_shapes(shape) if is_linear(n)}
    if not isinstance(entries, dict) or entries.keys() != sizes.keys():
        raise ModelError(f"{path} does not list the linears that config.json requires: export the model again")
    out = {}
    for name, size in sizes.items():
        try:
            stored = StoredLinear(**read_fields(StoredLinear, entries[name], ValueError, "linear"))
        except ValueError:
            stored = None
        if stored is None or stored.group not in ((32, 64, 128, 256) if stored.kind == "int4" else (0,)) or stored.shape != size:
            raise ModelError(f"{path} lists '{name}' as {entries[name]!s:.80}, which does not fit {size}: export the model again")
        out[name] = stored
    return out


def is_linear(name: str) -> bool:
    """Whether a tensor name is that of a linear's weight."""
    return name == "lm_head.weight" or name.endswith("_proj.weight")


def _check_seal(folder: Path, digests: Any, seen: bool) -> None:
    here = {path.name for path in folder.iterdir() if path.is_file() and sealed(path.name)}
    if not isinstance(digests, dict) or digests.keys() != here:
        raise ModelError(f"{folder / PACKAGE} does not list the files in {folder}: one is missing or was added; export it again")
    for name in sorted(here):
        if not (seen and name.startswith("weights-")) and digest(folder / name) != digests[name]:
            raise ModelError(
                f"{folder / name} has another digest than after the export: it is damaged; copy the package again or export it again"
            )


def _check(folder: Path, shape: Shape, linears: Mapping[str, StoredLinear], tensors: StoredTensors, seen: bool) -> None:
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for name, size in tensor_shapes(shape):
        if is_linear(name):
            for part, (dtype, own) in linear_tensors(name.removesuffix(".weight"), linears[name.removesuffix(".weight")]).items():
                wanted[part] = (dtype,), own
        else:
            wanted[name] = ("F32", "BF16") if len(size) == 2 else ("F32",), size
    wanted |= {name: (("F32",), size) for name, size in _virtual(shape, tensors).items()}
    if missing := [n for n in wanted if n not in tensors.specs]:
        raise ModelError(f"{folder} lacks the tensor '{missing[0]}' ({len(missing)} such) that its config requires: export it again")
    if surplus := [n for n in tensors if n not in wanted]:
        raise ModelError(f"{folder} holds '{surplus[0]:.80}', which its config does not have: export the model again")
    for name, (dtypes, size) in wanted.items():
        dtype, found = tensors.specs[name]
        if dtype not in dtypes or found != size:
            difference = f"{_NAMES.get(dtype, dtype)} {found}, but its config requires {_NAMES[dtypes[0]]} {size}"
            raise ModelError(f"{folder}: '{name}' is {difference}: export the model again")
        # the large matrices stay on the disk until they are used
        if seen:
            continue
        small = name.endswith((".scale", ".zero")) or len(size) != 2 or name == "prompt.embeds"
        if small and not np.isfinite(as_float32(tensors[name])).all():
            raise ModelError(f"{folder}: '{name}' holds numbers that are not finite: the package is damaged")


def _virtual(shape: Shape, tensors: StoredTensors) -> dict[str, tuple[int, ...]]:
    """Shapes of the virtual tokens' tensors; their count t is taken from the tensors."""
    found = {n: tensors.specs[n][1] for n in ("prompt.embeds", "prefix.k") if n in tensors.specs}
    if len(size := found.get("prompt.embeds", ())) == 2 and size[0]:
        return {"prompt.embeds": (size[0], shape.hidden)}
    if len(size := found.get("prefix.k", ())) == 4 and size[1]:
        size = (shape.layers, size[1], shape.kv_heads, shape.head_dim)
        return {"prefix.k": size, "prefix.v": size}
    return {}  # then any such tensor is surplus


def _adapter(path: Path, shape: Shape, base: Any) -> dict[str, tuple[Floats, Floats]]:
    """Read a separate adapter: module → A and B."""
    stored = StoredTensors()
    metadata = stored.add(path, "F32")
    try:
        own = parse_json(metadata["fedtune"])["base"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{path} is not an adapter of a package: its metadata does not name a backbone") from None
    if own != base:
        raise ModelError(f"{path} belongs to the backbone {own!s:.40}, the package to {base}: use an adapter of the same one")
    sizes = {n.removesuffix(".weight"): s for n, s in tensor_shapes(shape) if is_linear(n)}
    out = {}
    for module in sorted({n.rpartition(".")[0] for n in stored}):
        (_, a), (_, b) = (stored.specs.get(f"{module}.lora_{x}", (None, ())) for x in "AB")
        rank = a[0] if len(a) == 2 else 0
        if not rank or module not in sizes or a != (rank, sizes[module][1]) or b != (sizes[module][0], rank):
            raise ModelError(f"{path}: the factors of '{module:.80}' do not fit the decoder: the adapter is another model's, or damaged")
        out[module] = as_float32(stored[f"{module}.lora_A"]), as_float32(stored[f"{module}.lora_B"])
        if not all(np.isfinite(t).all() for t in out[module]):
            raise ModelError(f"{path}: the factors of '{module}' hold numbers that are not finite: the adapter is damaged")
    if 2 * len(out) != len(stored):
        raise ModelError(f"{path} holds more than an adapter's factors: it is damaged")
    return out

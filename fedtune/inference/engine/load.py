"""Loads a Hugging Face folder or an edge package.

Files are memory-mapped. Tensors that are not packed are used in the mapped file. Linears are packed one at a time, and the file's pages are
released before the next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.inference.engine import ready
from fedtune.inference.engine.bfloat16 import Array, as_float32
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.budget import Choice
from fedtune.inference.engine.decoder import Decoder, linears_of
from fedtune.inference.engine.gptq_config import Packing, split_config
from fedtune.inference.engine.layer import Layer, make_layer
from fedtune.inference.engine.layout import Fused, linears, norm_sizes
from fedtune.inference.engine.linear import KINDS, Linear, dequantized, portable
from fedtune.inference.engine.lora import Lora, make_lora
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.package import PACKAGE, Package, is_package, read_package
from fedtune.inference.engine.rope import pairs
from fedtune.inference.engine.shape import Shape, Unsupported, canonical, read_shape
from fedtune.storage.checkpoint_files import weight_files
from fedtune.storage.parsing import parse_json
from fedtune.storage.parsing import read_text as text_of
from fedtune.storage.tensor_files import StoredTensor, read_header

Floats = NDArray[np.float32]
GROUP = 32  # columns per scale when weights are quantized to int4 here
FLOATS = {"F32": "fp32", "BF16": "bf16", "F16": "bf16"}  # dtype in a file → kind in memory


@dataclass
class Engine:
    """A model that is ready to generate.

    Attributes:
        folder: The model's folder.
        decoder: The decoder.
        card: fedtune.json, {} if there is none.
        prompt: [t, d] embeddings of virtual tokens (prompt tuning), or None.
        prefix: Keys and values [L, t, Hkv, D] of virtual tokens (prefix tuning), keys as in the model's own cache, or None.
    """

    folder: Path
    decoder: Decoder
    card: dict[str, Any] = field(default_factory=dict)
    prompt: Floats | None = None
    prefix: tuple[Floats, Floats] | None = None

    @property
    def shape(self) -> Shape:
        return self.decoder.shape

    @property
    def adapters(self) -> dict[str, Lora]:
        """The separate adapters by name, for `Span.adapter`."""
        return self.decoder.adapters

    def add_adapter(self, name: str, factors: Mapping[str, tuple[Floats, Floats]]) -> None:
        """Make an adapter available to spans; `factors` and errors as in `make_lora`."""
        self.decoder.adapters[name] = make_lora(self.shape, factors, name)

    @cached_property
    def text(self) -> Any:
        """The folder's tokenizer (`Text`)."""
        from fedtune.inference.engine.text import read_text  # lazy: not needed to decode ids

        return read_text(self.folder, saved=is_package(self.folder))

    @property
    def virtual_length(self) -> int:
        """Number of virtual tokens before every text."""
        return len(self.prompt) if self.prompt is not None else self.prefix[0].shape[1] if self.prefix is not None else 0

    def cache(self, policy: str = "full", limit: int | None = None) -> Cache:
        """Create an empty cache with a policy of `Choice`; the default limit is the model's context."""
        return Choice(shape=self.shape, tokens=limit or self.shape.context, policy=policy, dtype=self.entries).build()

    @property
    def entries(self) -> str:
        """The dtype of its caches' entries: bfloat16, but float32 for fp32 weights, and for torch, which is slower otherwise."""
        exact = any(linear.kind == "fp32" for linear in linears_of(self.decoder)) or self.decoder.native_step() is None
        return "float32" if exact else "bfloat16"

    def start(self, cache: Cache) -> None:
        """Put the model's virtual tokens, if any, into an empty cache."""
        if cache.length:
            raise ModelError(f"virtual tokens come first, but the cache already holds {cache.length} tokens: use an empty one")
        if self.prompt is not None:
            self.decoder.forward(None, [Span(cache, self.virtual_length, keep=0)], embeds=self.prompt)
        elif self.prefix is not None:
            shape, done = self.shape, 0
            order = pairs(1, shape.head_dim, shape.rotary)
            while done < self.virtual_length:
                n = cache.most(self.virtual_length - done)
                cache.prepare(n)
                for layer, (k, v, rope) in enumerate(zip(*self.prefix, self.decoder.ropes, strict=True)):
                    # the model does not rotate these keys, but the cache rotates its input: so undo that rotation in advance
                    part = slice(done, done + n)
                    cache.write(layer, rope.unrotate(k[part][..., order], done), v[part], rope)
                cache.advance(n)
                done += n


def load_engine(folder: Path | str, kind: str | None = None, *, keep: bool = True) -> Engine:
    """Load a model. Large packages, and models quantized on loading, are packed once and memory-mapped afterward (see `ready`).

    Args:
        folder: A Hugging Face folder or an edge package.
        kind: fp32, bf16, int8 or int4 (rounded to nearest in groups of 32; the head in int8, for more precise logits). None keeps the
            stored format. A quantized package can be loaded unchanged, or dequantized to fp32 or bf16.
        keep: Whether packed weights may be stored on disk; False for a temporary folder.

    Raises:
        Unsupported: The engine does not support the architecture.
        ModelError: The folder is incomplete or damaged, or the kind is unknown.
    """
    folder = Path(folder)
    if kind is not None and kind not in KINDS:
        raise ModelError(f"there is no kind {kind!r}: choose {', '.join(KINDS)}")
    return _package(folder, kind, keep) if is_package(folder) else _hugging_face(folder, kind, keep)


def _package(folder: Path, kind: str | None, keep: bool) -> Engine:
    where = ready.place(folder, kind, [folder / PACKAGE, folder / "config.json", *folder.glob("weights-*.safetensors")]) if keep else None
    linears = ready.open_ready(where) if where else None
    package = read_package(folder, seen=linears is not None)
    source, tensors = _Packed(package), package.tensors
    decoder = _decoder(package.shape, source, _linears(where, linears, _Packing(package.shape, source, kind)))
    engine = Engine(folder, decoder, package.card)
    engine.prompt = as_float32(tensors["prompt.embeds"]) if "prompt.embeds" in tensors else None
    engine.prefix = (as_float32(tensors["prefix.k"]), as_float32(tensors["prefix.v"])) if "prefix.k" in tensors else None
    for name, factors in package.adapters.items():
        engine.add_adapter(name, factors)
    return engine


def _hugging_face(folder: Path, kind: str | None, keep: bool) -> Engine:
    config = read_json(folder / "config.json")
    plain, packing = split_config(config)
    shape, files = read_shape(plain), weight_files(folder, config)
    card = read_json(folder / "fedtune.json") if (folder / "fedtune.json").is_file() else {}
    if "peft" in card:
        raise Unsupported(f"{folder} has an unmerged adapter: export it with `--to edge` for the engine")
    source = _Mapped(folder, files, packing)
    quantizes = keep and kind in ("int8", "int4")
    where = ready.place(folder, kind, [folder / "config.json", *files]) if quantizes else None
    linears = ready.open_ready(where) if where else None
    return Engine(folder, _decoder(shape, source, _linears(where, linears, _Packing(shape, source, kind))), card)


def _linears(where: ready.Place | None, found: dict[str, Linear] | None, packing: "_Packing") -> Callable[[str], Linear]:
    """Return the mapped linears, after packing them on disk if needed; if that fails, pack them in memory."""
    sizes = packing.sizes()
    if where and not _fits(found, sizes) and ready.write_ready(where, packing.every()):
        found = ready.open_ready(where)
    return found.__getitem__ if found and _fits(found, sizes) else packing


def _fits(found: Mapping[str, Linear] | None, sizes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether the mapped linears have these sizes."""
    return found is not None and {name: (linear.n_in, linear.n_out) for name, linear in found.items()} == sizes


def read_json(file: Path) -> dict[str, Any]:
    """Read an object from a small JSON file. Raises ModelError."""
    try:
        found = parse_json(text_of(file))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): give a model folder") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not JSON: export the model again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file} does not hold a JSON object: export the model again")
    return found


Stored = tuple[str, int, dict[str, Array]]  # kind, int4's group, portable tensors


class _Source(Protocol):
    """Tensors by Hugging Face name. Each is mapped when it is requested, and its pages are freed with it."""

    def tensor(self, name: str, size: tuple[int, ...]) -> Array: ...

    def stored_kind(self, name: str) -> str:
        """The kind of a linear, named without `.weight`."""
        ...

    def linear(self, name: str, size: tuple[int, int], kind: str) -> Stored: ...


class _Packed:
    """An edge package, whose reader has checked names, shapes and dtypes."""

    def __init__(self, package: Package) -> None:
        self._package = package

    def tensor(self, name: str, size: tuple[int, ...]) -> Array:
        return self._package.tensors[name]

    def stored_kind(self, name: str) -> str:
        return self._package.linears[name].kind

    def linear(self, name: str, size: tuple[int, int], kind: str) -> Stored:
        stored, tensors = self._package.linears[name], self._package.linear(name)
        tensors.pop("bias", None)
        if kind == stored.kind or (name == "lm_head" and kind == "int4" and stored.kind == "int8"):
            return stored.kind, stored.group, tensors
        if stored.kind in ("int8", "int4") and kind in ("int8", "int4"):
            raise ModelError(
                f"{self._package.folder} holds '{name}' in {stored.kind}, and {kind} would round it again: export the model in {kind}"
            )
        weight = dequantized(stored.kind, tensors, n_in=size[1], group=stored.group)
        return kind, GROUP, portable(kind, weight, group=GROUP)


class _Mapped:
    """The safetensors files of a Hugging Face folder. 4-bit weights of GPTQ or AWQ are dequantized."""

    def __init__(self, folder: Path, files: Sequence[Path], packing: Packing | None = None) -> None:
        self._folder, self._packing = folder, packing
        self._stored: dict[str, StoredTensor] = {}
        for file in files:
            self._stored |= {canonical(name): stored for name, stored in read_header(file)[0].items()}

    def _find(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise ModelError(f"{self._folder} has no tensor {name}: give a merged model, as written by `fedtune export`")
        return self._stored[name]

    def tensor(self, name: str, size: tuple[int, ...]) -> Array:
        stored = self._find(name)
        if stored.shape != size or stored.dtype not in FLOATS:
            raise ModelError(f"{stored.file} holds {name} as {stored.dtype} {stored.shape}, but config.json requires floats {size}")
        return stored.read()

    def stored_kind(self, name: str) -> str:
        if self._packs(name):
            return "bf16"
        return FLOATS.get(self._find(f"{name}.weight").dtype, "fp32")

    def linear(self, name: str, size: tuple[int, int], kind: str) -> Stored:
        if not self._packs(name):
            return kind, GROUP, portable(kind, self.tensor(f"{name}.weight", size), group=GROUP)
        if kind in ("int8", "int4"):
            raise ModelError(f"{self._folder} holds '{name}' in 4 bits, and {kind} would round it again: export the model with --to edge")
        from fedtune.inference.engine.gptq_awq import unpack_weight  # lazy: it loads torch
        from fedtune.inference.engine.reference.tensors import as_array, as_tensor

        assert self._packing is not None
        weight = unpack_weight(self._packing, lambda part: as_tensor(self._stored[f"{name}.{part}"].read()), size, name)
        return kind, GROUP, portable(kind, as_array(weight), group=GROUP)

    def _packs(self, name: str) -> bool:
        return self._packing is not None and f"{name}.qweight" in self._stored


def _decoder(shape: Shape, source: _Source, linear: Callable[[str], Linear]) -> Decoder:
    embed = source.tensor("model.embed_tokens.weight", (shape.vocab, shape.hidden))
    layers = [_layer(shape, source, linear, i) for i in range(shape.layers)]
    norm = as_float32(source.tensor("model.norm.weight", (shape.hidden,))) + np.float32(shape.norm_offset)
    return Decoder(shape, embed, layers, norm, linear("head"))


def _layer(shape: Shape, source: _Source, linear: Callable[[str], Linear], i: int) -> Layer:
    sizes = norm_sizes(shape)
    return make_layer(
        shape,
        {name: linear(f"layers.{i}.{name}") for name in linears(shape)},
        lambda name: as_float32(source.tensor(f"model.layers.{i}.{name}.weight", (sizes[name],))),
    )


class _Packing:
    """Packs a decoder's linears on request."""

    def __init__(self, shape: Shape, source: _Source, kind: str | None) -> None:
        self._shape, self._source, self._kind = shape, source, kind

    def sizes(self) -> dict[str, tuple[int, int]]:
        """n_in and n_out of every linear."""
        fused = {name: (own.columns, sum(part.rows for part in own.parts)) for name, own in linears(self._shape).items()}
        sizes = {f"layers.{i}.{name}": size for i in range(self._shape.layers) for name, size in fused.items()}
        return {**sizes, "head": (self._shape.hidden, self._shape.vocab)}

    def every(self) -> Iterator[tuple[str, Linear]]:
        for name in self.sizes():
            yield name, self(name)

    def __call__(self, name: str) -> Linear:
        if name == "head":
            return self._head()
        _, i, short = name.split(".")
        return self._fused(f"model.layers.{i}.", linears(self._shape)[short])

    def _fused(self, at: str, fused: Fused) -> Linear:
        """Fuse the linears of the layer whose names begin with `at`."""
        found: list[Stored] = []
        for part in fused.parts:
            name, n_in = at + part.module, fused.columns
            own, group, tensors = self._source.linear(name, (part.rows, n_in), self._kind or self._source.stored_kind(name))
            if fused.bias:
                tensors["bias"] = as_float32(self._source.tensor(f"{name}.bias", (part.rows,)))
            found.append((own, group, tensors if part.order is None else {key: t[part.order] for key, t in tensors.items()}))
        first = at + fused.parts[0].module
        own, group, whole = found[0]
        if any(other[:2] != (own, group) for other in found[1:]):
            raise ModelError(f"{first} and the linears fused with it are of different kinds: export the model again")
        if len(found) > 1:
            whole = {key: np.concatenate([tensors[key] for *_, tensors in found]) for key in whole}
            found.clear()
        return linear_from_tensors(own, whole, n_in=fused.columns, group=group, name=first)

    def _head(self) -> Linear:
        shape, source, kind = self._shape, self._source, self._kind
        if shape.tied:
            embed = source.tensor("model.embed_tokens.weight", (shape.vocab, shape.hidden))
            own = kind or source.stored_kind(f"model.layers.0.{linears(shape)['qkv'].parts[0].module}")
            own = "int8" if own == "int4" else own
            return linear_from_tensors(own, portable(own, embed), n_in=shape.hidden, name="lm_head")
        own = kind or source.stored_kind("lm_head")
        own = "int8" if own == "int4" and source.stored_kind("lm_head") != "int4" else own
        own, group, tensors = source.linear("lm_head", (shape.vocab, shape.hidden), own)
        return linear_from_tensors(own, tensors, n_in=shape.hidden, group=group, name="lm_head")

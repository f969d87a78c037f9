"""Open a Hugging Face folder or an edge package.

Files are memory-mapped. What is not packed is used where it lies; what is packed is read one layer at a time, and its file's pages are
let go before the next.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.budget import Choice
from fedtune.inference.engine.decoder import Decoder, Layer
from fedtune.inference.engine.linear import KINDS, Linear, dequantised, linear_from_tensors, portable
from fedtune.inference.engine.lora import Lora, make_lora
from fedtune.inference.engine.package import Package, is_package, read_package
from fedtune.inference.engine.rope import pairs
from fedtune.inference.engine.shape import Shape, Unsupported, read_shape

GROUP = 32  # columns that share a scale where int4 is made here
FLOATS = {"F32": "fp32", "BF16": "bf16", "F16": "bf16"}  # dtype in a file → kind that keeps it


@dataclass
class Engine:
    """A model that is ready to generate.

    Attributes:
        folder: Where it came from.
        decoder: Runs it.
        card: fedtune.json, {} where there is none.
        prompt: [t, d] embeddings of virtual tokens (prompt tuning), or None.
        prefix: Keys and values [L, t, Hkv, D] of virtual tokens (prefix tuning), keys as the model's own cache would hold them, or None.
    """

    folder: Path
    decoder: Decoder
    card: dict[str, Any] = field(default_factory=dict)
    prompt: Tensor | None = None
    prefix: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> Shape:
        return self.decoder.shape

    @property
    def adapters(self) -> dict[str, Lora]:
        """The separate adapters by name: what `Span.adapter` may say."""
        return self.decoder.adapters

    def add_adapter(self, name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Let spans choose an adapter; `factors` as in `make_lora`, which says what it raises."""
        self.decoder.adapters[name] = make_lora(self.shape, factors, name)

    @cached_property
    def text(self) -> Any:
        """The folder's tokeniser (`Text`)."""
        from fedtune.inference.engine.text import read_text  # late: a decoder of ids needs none

        return read_text(self.folder)

    @property
    def virtual(self) -> int:
        """Virtual tokens that stand before every text."""
        return self.prompt.shape[0] if self.prompt is not None else self.prefix[0].shape[1] if self.prefix is not None else 0

    def cache(self, policy: str = "full", limit: int | None = None) -> Cache:
        """An empty cache by one of `Choice`'s policies; None for the limit takes the model's context."""
        return Choice(shape=self.shape, tokens=limit or self.shape.context, policy=policy).build()

    @torch.inference_mode()
    def start(self, cache: Cache) -> None:
        """Put the model's virtual tokens, if it has any, into an empty cache as its first entries."""
        if cache.length:
            raise ModelError(f"virtual tokens stand first, and the cache holds {cache.length} tokens already: start with an empty one")
        if self.prompt is not None:
            self.decoder.forward(None, [Span(cache, self.virtual, keep=0)], embeds=self.prompt)
        elif self.prefix is not None:
            shape, rope, n = self.shape, self.decoder.rope, self.virtual
            order, q = pairs(1, shape.head_dim), torch.zeros(n, shape.heads, shape.head_dim)
            for layer, (k, v) in enumerate(zip(*self.prefix, strict=True)):
                # nothing rotates these keys in the model; a cache rotates what it is given, so it is given what that makes them of
                cache.attend(layer, q, rope.unrotate(k[..., order], 0), v.float(), rope)
            cache.advance(n)


def load_engine(folder: Path | str, kind: str | None = None) -> Engine:
    """Open a model.

    Args:
        folder: A Hugging Face folder or an edge package.
        kind: fp32, bf16, int8 or int4 (rounded to nearest in groups of 32; the head in int8, since its logits are worth 8 bits). None
            keeps what is stored. A package that is quantised opens as it is, or dequantised as fp32 or bf16.

    Raises:
        Unsupported: The engine does not run this architecture.
        ModelError: The folder is incomplete or damaged, or the kind is none of these.
    """
    folder = Path(folder)
    if kind is not None and kind not in KINDS:
        raise ModelError(f"there is no kind {kind!r}: choose {', '.join(KINDS)}")
    with torch.inference_mode():
        if is_package(folder):
            package = read_package(folder)
            tensors = package.tensors
            engine = Engine(folder, _decoder(package.shape, _Packed(package), kind), package.card)
            engine.prompt = tensors["prompt.embeds"].float() if "prompt.embeds" in tensors else None
            engine.prefix = (tensors["prefix.k"].float(), tensors["prefix.v"].float()) if "prefix.k" in tensors else None
            for name, factors in package.adapters.items():
                engine.add_adapter(name, factors)
            return engine
        shape = read_shape(read_json(folder / "config.json"))
        card = read_json(folder / "fedtune.json") if (folder / "fedtune.json").is_file() else {}
        if "peft" in card:
            raise Unsupported(f"{folder} keeps an adapter beside its weights: export it with `--to edge` for the engine")
        return Engine(folder, _decoder(shape, _Mapped(folder), kind), card)


def read_json(file: Path) -> dict[str, Any]:
    """An object of a small JSON file, or ModelError."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}): give a model folder") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is no JSON: export the model again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no JSON object: export the model again")
    return found


Stored = tuple[str, int, dict[str, Tensor]]  # kind, int4's group, portable tensors


class _Source(Protocol):
    """Tensors by their Hugging Face names, each mapped anew when it is asked for: its pages go when it goes."""

    def tensor(self, name: str, size: tuple[int, ...]) -> Tensor: ...

    def stored_kind(self, name: str) -> str:
        """Of a linear, named without `.weight`."""
        ...

    def linear(self, name: str, size: tuple[int, int], kind: str) -> Stored: ...


class _Packed:
    """An edge package, whose reader has checked names, shapes and dtypes."""

    def __init__(self, package: Package) -> None:
        self._package = package

    def tensor(self, name: str, size: tuple[int, ...]) -> Tensor:
        return self._package.tensors[name]

    def stored_kind(self, name: str) -> str:
        return self._package.linears[name].kind

    def linear(self, name: str, size: tuple[int, int], kind: str) -> Stored:
        stored, tensors = self._package.linears[name], self._package.linear(name)
        tensors.pop("bias", None)
        if kind == stored.kind or (name == "lm_head" and kind == "int4" and stored.kind == "int8"):
            return stored.kind, stored.group, tensors
        if stored.kind in ("int8", "int4") and kind in ("int8", "int4"):
            raise ModelError(f"{self._package.folder} holds '{name}' in {stored.kind}, which {kind} would round once more: export it again")
        if stored.kind == "int8" and stored.group:
            raise ModelError(f"{self._package.folder} holds '{name}' in int8 with groups: the engine runs one scale a row; export it again")
        weight = dequantised(stored.kind, tensors, n_in=size[1], group=stored.group)
        return kind, GROUP, portable(kind, weight, group=GROUP)


class _Mapped:
    """The safetensors files of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, Path] = {}
        for file in _files(folder):
            with _opened(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - a handle is no dict
                    self._where[name] = file

    def _file(self, name: str) -> Path:
        if name not in self._where:
            raise ModelError(f"{self._folder} holds no tensor {name}: give a merged model, as `fedtune export` writes it")
        return self._where[name]

    def tensor(self, name: str, size: tuple[int, ...]) -> Tensor:
        file = self._file(name)
        with _opened(file) as handle:
            part = handle.get_slice(name)
            if tuple(part.get_shape()) != size or part.get_dtype() not in FLOATS:
                raise ModelError(f"{file} holds {name} as {part.get_dtype()} {tuple(part.get_shape())}, config.json asks for floats {size}")
            return handle.get_tensor(name)

    def stored_kind(self, name: str) -> str:
        name = f"{name}.weight"
        with _opened(self._file(name)) as handle:
            return FLOATS.get(handle.get_slice(name).get_dtype(), "fp32")

    def linear(self, name: str, size: tuple[int, int], kind: str) -> Stored:
        return kind, GROUP, portable(kind, self.tensor(f"{name}.weight", size), group=GROUP)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{file} is no sound safetensors file ({str(error).splitlines()[0]:.80}): export the model again") from None


def _files(folder: Path) -> list[Path]:
    """The files that the index names, or all of them."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no .safetensors file: give a merged model, as `fedtune export` writes it")
        return files
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(n, str) and Path(n).name == n for n in named.values()):
        raise ModelError(f"{index} has no weight_map of file names: export the model again")
    return [folder / name for name in sorted(set(named.values()))]


def _decoder(shape: Shape, source: _Source, kind: str | None) -> Decoder:
    embed = source.tensor("model.embed_tokens.weight", (shape.vocab, shape.hidden))
    layers = [_layer(shape, source, kind, i) for i in range(shape.layers)]
    norm = source.tensor("model.norm.weight", (shape.hidden,)).float()
    if shape.tied:
        own = kind or source.stored_kind("model.layers.0.self_attn.q_proj")
        own = "int8" if own == "int4" else own
        head = linear_from_tensors(own, portable(own, embed), n_in=shape.hidden, name="lm_head")
    else:
        own = kind or source.stored_kind("lm_head")
        own = "int8" if own == "int4" and source.stored_kind("lm_head") != "int4" else own
        own, group, tensors = source.linear("lm_head", (shape.vocab, shape.hidden), own)
        head = linear_from_tensors(own, tensors, n_in=shape.hidden, group=group, name="lm_head")
    return Decoder(shape, embed, layers, norm, head)


def _layer(shape: Shape, source: _Source, kind: str | None, i: int) -> Layer:
    at = f"model.layers.{i}."
    d, inner, width = shape.hidden, shape.intermediate, shape.head_dim
    q, kv = shape.heads * width, shape.kv_heads * width

    def norm(name: str, size: int) -> Tensor:
        return source.tensor(f"{at}{name}.weight", (size,)).float()

    def fused(*parts: tuple[str, int, Tensor | None], n_in: int, bias: bool) -> Linear:
        found: list[Stored] = []
        for short, size, order in parts:
            name = at + short
            own, group, tensors = source.linear(name, (size, n_in), kind or source.stored_kind(name))
            if bias:
                tensors["bias"] = source.tensor(f"{name}.bias", (size,)).float()
            found.append((own, group, tensors if order is None else {key: t[order] for key, t in tensors.items()}))
        own, group, whole = found[0]
        if any(other[:2] != (own, group) for other in found[1:]):
            raise ModelError(f"{at}{parts[0][0]} and what runs with it are of different kinds: export the model again")
        if len(found) > 1:
            whole = {key: torch.cat([tensors[key] for *_, tensors in found]) for key in whole}
            found.clear()
        return linear_from_tensors(own, whole, n_in=n_in, group=group, name=at + parts[0][0])

    turned = pairs(1, width)
    return Layer(
        norm=norm("input_layernorm", d),
        qkv=fused(
            ("self_attn.q_proj", q, pairs(shape.heads, width)),
            ("self_attn.k_proj", kv, pairs(shape.kv_heads, width)),
            ("self_attn.v_proj", kv, None),
            n_in=d,
            bias=shape.qkv_bias,
        ),
        o=fused(("self_attn.o_proj", d, None), n_in=q, bias=shape.o_bias),
        q_norm=norm("self_attn.q_norm", width)[turned] if shape.qk_norm else None,
        k_norm=norm("self_attn.k_norm", width)[turned] if shape.qk_norm else None,
        mlp_norm=norm("post_attention_layernorm", d),
        gate_up=fused(("mlp.gate_proj", inner, None), ("mlp.up_proj", inner, None), n_in=d, bias=shape.mlp_bias),
        down=fused(("mlp.down_proj", d, None), n_in=inner, bias=shape.mlp_bias),
    )

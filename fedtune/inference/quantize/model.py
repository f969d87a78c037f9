"""Quantizes a decoder layer by layer: memory holds the weights of one layer and one batch of the calibration text.

Each layer is calibrated on the outputs of the quantized layers before it, so that later layers compensate their errors.

With d hidden channels, f intermediate channels and P weights per layer, method=gptq, awq and smoothquant need at most about
4 (3 d² + 3 f² + P) bytes plus a layer's outputs; the text's hidden states are on disk. method=rtn needs no text, and only blocks of rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.layout import linears
from fedtune.inference.engine.package import is_linear, tensor_shapes
from fedtune.inference.engine.shape import Shape
from fedtune.inference.quantize.awq import awq_scale, output_loss
from fedtune.inference.quantize.fold import Fold, folds
from fedtune.inference.quantize.gptq import inverse_factor, quantize_gptq
from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.layers import InputStats, Stats, embedded, observe, pass_layer, prefix_of
from fedtune.inference.quantize.rtn import GROUP, Kind, QuantizedLinear, dequantize, packed, portable_tensors, quantize_rtn
from fedtune.inference.quantize.smoothquant import smooth_scale
from fedtune.inference.quantize.weights import Read, Weights
from fedtune.storage.heap import give_back

__all__ = ["FOLDING", "METHODS", "Method", "QuantizeSettings", "quantize_model", "quantize_rows"]

Method = Literal["rtn", "gptq", "awq", "smoothquant"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "awq", "smoothquant")
FOLDING: tuple[Method, ...] = ("awq", "smoothquant")  # these change the scale of activations between layers
_STRETCH = 1 << 17  # weights that are rounded at once; rows are independent
_GPTQ = 1 << 21  # the same for gptq


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """Settings for quantizing a model.

    Args:
        kind: Format of all linears but the head.
        group: Columns per int4 scale; 0 for int8: the a8w8 product needs one scale per row.
        method: Rounding method; smoothquant is only for int8, whose activations are rounded too.
        head: Format of the output head, with its own group size; int8 by default, for more precise logits. None: it is not quantized.
    """

    kind: Kind = "int4"
    group: int = GROUP
    method: Method = "rtn"
    head: Kind | None = "int8"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"there is no quantization method '{self.method}': choose from {', '.join(METHODS)}")
        if self.method == "smoothquant" and self.kind != "int8":
            raise ConfigError(f"smoothquant is for int8 activations, which {self.kind} does not have: use method=awq or gptq")

    @property
    def of_head(self) -> "QuantizeSettings":
        """The settings of the head, which is quantized."""
        assert self.head is not None
        return replace(self, kind=self.head, group=GROUP if self.head == "int4" else 0)


def quantize_rows(
    read: Callable[[int, int], Tensor], size: tuple[int, int], recipe: QuantizeSettings, stats: Stats | None = None, *, most: int = _GPTQ
) -> QuantizedLinear:
    """Quantize a weight [N, K] to the portable format, in blocks of rows. awq and smoothquant round to nearest here, because their scales
    are folded already.

    Args:
        read: Returns rows `first` to `last` of the weight.
        size: N, K.
        most: Weights per block for gptq, which iterates over all columns once per block.
    """
    if recipe.method == "gptq" and stats is None:
        raise ModelError("gptq needs statistics of the inputs: give calibration text")
    gptq = stats if recipe.method == "gptq" else None
    factor = None if gptq is None else inverse_factor(gptq.hessian)
    # allocated first, not concatenated at the end: kept parts between temporary ones would fragment the heap
    parts = portable_tensors(recipe.kind, recipe.group, size).items()
    out = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in parts}
    lost, energy, off, whole = 0.0, 0.0, 0.0, 0.0
    for first in range(0, size[0], step := max((_STRETCH if gptq is None else most) // size[1], 1)):
        part = read(first, min(first + step, size[0])).float()
        if gptq is not None:
            grid, codes = quantize_gptq(part, gptq.hessian, recipe.kind, recipe.group, factor=factor)
        else:
            grid, codes = quantize_rtn(part, recipe.kind, recipe.group)
        for a in range(0, len(part), few := max(_STRETCH // size[1], 1)):
            b = min(a + few, len(part))
            own, kept = replace(grid, scale=grid.scale[a:b], zero=grid.zero[a:b]), part[a:b]
            if stats is not None:
                lost += output_loss(own.values(codes[a:b]) - kept, stats.hessian)
                energy += output_loss(kept, stats.hessian)
            rows, norm = packed(own, codes[a:b], kept), float(kept.norm()) ** 2
            for name, values in rows.tensors.items():
                out[name][first + a : first + b] = values
            off, whole = off + rows.error**2 * norm, whole + norm
    found = None if stats is None else (lost / energy) ** 0.5 if energy else 0.0
    error = (off / whole) ** 0.5 if whole else 0.0
    return QuantizedLinear(kind=recipe.kind, group=recipe.group, tensors=out, columns=size[1], error=error, output_error=found)


class _Made(Mapping[str, Tensor]):
    """The tensors of a quantized layer, dequantized on request."""

    def __init__(self, made: Mapping[str, Tensor | QuantizedLinear]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> Tensor:
        found = self._made[name]
        return dequantize(found) if isinstance(found, QuantizedLinear) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@torch.inference_mode()
def quantize_model(
    shape: Shape,
    read: Read,
    recipe: QuantizeSettings,
    text: Sequence[Tensor] = (),
    virtual: Mapping[str, Tensor] | None = None,
    scratch: Path | None = None,
) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """Yield every tensor of a decoder except its embedding table, layer by layer: linears' weights quantized, the others float32.

    awq and smoothquant also change norms and biases, by folding scales into them. A tied model gets an `lm_head.weight` too, a quantized
    copy of the embedding table. A head that is not quantized is left out.

    Args:
        read: Returns rows of a tensor, given its Hugging Face name.
        text: Token ids [n] of each calibration sequence; not needed for rtn.
        virtual: Virtual tokens before each sequence: `prompt.embeds` [t, d], or `prefix.k` and `prefix.v` [L, t, Hkv, D]. With a prefix, no
            scale is folded into `v_proj`, because the prefix's values do not come from it.
        scratch: Folder for the text's hidden states, 4 T d bytes in an unnamed file; None uses the system's temporary folder.

    Raises:
        ConfigError: The method needs text and there is none.
        ModelError: As in `quantize_rows`, or a token id is out of range.
    """
    if recipe.method != "rtn" and not text:
        raise ConfigError(f"method={recipe.method} needs calibration text: give some, or use method=rtn")
    sizes = dict(tensor_shapes(shape))
    virtual = virtual or {}
    prompt = virtual.get("prompt.embeds")
    hidden = embedded(shape, read, text, prompt, scratch) if recipe.method != "rtn" else None
    points = [fold for fold in folds(shape) if "prefix.v" not in virtual or fold.source != "self_attn.v_proj"]
    for index in range(shape.layers):
        at = f"model.layers.{index}."
        names = [name for name in sizes if name.startswith(at)]
        if hidden is None:
            yield from ((name, _plain(name, read, sizes[name], recipe)) for name in names)
            continue
        weights, prefix = Weights({name[len(at) :]: name for name in names}, sizes, read), prefix_of(virtual, index)
        fused = linears(shape)
        stats = {module: s for name, s in observe(shape, index, weights, hidden, prefix).items() for module in fused[name].modules}
        give_back()  # else freed memory of each layer would add up
        for fold in points:
            _fold(fold, weights, stats, recipe, shape.head_dim)
        out: dict[str, Tensor | QuantizedLinear] = {}
        for name in weights:
            own = stats.pop(name.removesuffix(".weight")) if is_linear(name) else None
            out[name] = quantize_rows(partial(weights.rows, name), _matrix(weights.sizes[name]), recipe, own) if own else weights[name]
            del own
            give_back()
        pass_layer(shape, index, _Made(out), hidden, prefix)
        give_back()
        yield from ((at + name, out.pop(name)) for name in list(out))
    if recipe.head is None:
        yield "model.norm.weight", read("model.norm.weight", 0, shape.hidden).float()
        return
    yield from _head(shape, read, recipe, hidden, 0 if prompt is None else len(prompt))


def _matrix(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[1]


def _plain(name: str, read: Read, size: tuple[int, ...], recipe: QuantizeSettings) -> Tensor | QuantizedLinear:
    return quantize_rows(partial(read, name), _matrix(size), recipe) if is_linear(name) else read(name, 0, size[0]).float()


def _head(
    shape: Shape, read: Read, recipe: QuantizeSettings, hidden: Hidden | None, before: int
) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """Yield the final norm and the head. The first `before` states of each sequence, those of virtual tokens, are ignored: their logits are
    never used."""
    recipe, source = recipe.of_head, "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    size = (shape.vocab, shape.hidden)
    weights = Weights({"norm.weight": "model.norm.weight", "lm_head.weight": source}, {"model.norm.weight": size[1:], source: size}, read)
    stats, norm = {}, weights["norm.weight"]
    if hidden is not None:
        watch = InputStats(shape.hidden)
        for h in hidden:
            watch.add(torch.rms_norm(h[before:], (shape.hidden,), norm + shape.norm_offset, shape.eps))
        stats["lm_head"] = watch.stats()
        _fold(Fold("norm", ("lm_head",), shape.norm_offset), weights, stats, recipe, 1)
    yield "model.norm.weight", weights["norm.weight"]
    most = min(_GPTQ, shape.hidden * shape.intermediate)  # no more than in a layer
    yield "lm_head.weight", quantize_rows(partial(weights.rows, "lm_head.weight"), size, recipe, stats.get("lm_head"), most=most)


def _fold(fold: Fold, weights: Weights, stats: dict[str, Stats], recipe: QuantizeSettings, width: int) -> None:
    """Search the scale of this point and apply it to `weights` and `stats`."""
    if recipe.method not in FOLDING:
        return
    own, outputs = stats[fold.readers[0]], weights.sizes[f"{fold.source}.weight"][0]
    step = max(_STRETCH // own.mean.numel(), 1)
    names = [f"{reader}.weight" for reader in fold.readers]
    spans = ((name, a, min(a + step, weights.sizes[name][0])) for name in names for a in range(0, weights.sizes[name][0], step))
    parts = (weights.rows(*span) for span in spans)
    shared = {"shared": own.mean.numel() // outputs, "width": width}
    if recipe.method == "awq":
        scale = awq_scale(parts, own.mean, own.hessian, recipe.kind, recipe.group, **shared)
    else:
        scale = smooth_scale(parts, own.greatest, **shared)
    weights.fold(fold, scale, width)
    stats.update(dict.fromkeys(fold.readers, own.scaled(scale)))

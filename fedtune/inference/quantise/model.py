"""Quantise a decoder layer by layer: only one layer's weights and Hessians are in memory, beside the calibration text's hidden states.

What a layer is calibrated on has passed the quantised layers before it, so that later ones make up for them.

With T tokens of text, d hidden, f intermediate channels and P weights in a layer, method=gptq, awq and smoothquant take at most about
4 (2 T d + 3 d² + f² + 3 P) bytes, and then the head; method=rtn takes one tensor at a time and no text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.package import is_linear, tensor_shapes
from fedtune.inference.engine.shape import Shape
from fedtune.inference.quantise.awq import awq_scale, output_loss
from fedtune.inference.quantise.fold import FOLDS, Fold, folded
from fedtune.inference.quantise.gptq import quantise_gptq
from fedtune.inference.quantise.layers import FUSED, Read, Stats, Watch, embedded, observe, pass_layer
from fedtune.inference.quantise.rtn import GROUP, Grid, Kind, QuantisedLinear, dequantise, packed, quantise_rtn
from fedtune.inference.quantise.smoothquant import smooth_scale

__all__ = ["METHODS", "Method", "Recipe", "quantise_linear", "quantise_model"]

Method = Literal["rtn", "gptq", "awq", "smoothquant"]
METHODS: tuple[Method, ...] = ("rtn", "gptq", "awq", "smoothquant")
_STRETCH = 1 << 22  # weights that are worked on at once; rows do not hang on each other


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantised.

    Args:
        kind: Of all linears but the head.
        group: Columns that share a scale; int8 also takes 0, a whole row, which is what the a8w8 product wants.
        method: Of rounding; smoothquant is for int8, whose activations are rounded too.
        head: Kind of the output head, with groups of its own: int8's are rows. The logits are worth 8 bits.
    """

    kind: Kind = "int4"
    group: int = GROUP
    method: Method = "rtn"
    head: Kind = "int8"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"there is no quantisation method '{self.method}': choose from {', '.join(METHODS)}")
        if self.method == "smoothquant" and self.kind != "int8":
            raise ConfigError(f"smoothquant makes activations fit int8 and {self.kind} does not round them: take method=awq or gptq")

    @property
    def of_head(self) -> "Recipe":
        """For the head alone."""
        return replace(self, kind=self.head, group=GROUP if self.head == "int4" else 0)


def quantise_linear(weight: Tensor, recipe: Recipe, stats: Stats | None = None) -> QuantisedLinear:
    """A weight [N, K] in the portable form; what awq and smoothquant fold is folded already, so that they round to nearest.

    Raises:
        ModelError: As `fit_grid` and `quantise_gptq`; or gptq without `stats`.
    """
    if recipe.method == "gptq" and stats is None:
        raise ModelError("gptq rounds by what the inputs are like: give it calibration text")
    parts, whole, lost, energy = [], [], 0.0, 0.0
    for first in range(0, weight.shape[0], step := max(_STRETCH // weight.shape[1], 1)):
        part = weight[first : first + step].float()
        if stats is not None and recipe.method == "gptq":
            grid, codes = quantise_gptq(part, stats.hessian, recipe.kind, recipe.group)
        else:
            grid, codes = quantise_rtn(part, recipe.kind, recipe.group)
        if stats is not None:
            lost += output_loss(grid.values(codes) - part, stats.hessian)
            energy += output_loss(part, stats.hessian)
        parts.append(grid)
        whole.append(codes)
    first = parts[0]
    grid = Grid(kind=first.kind, group=first.group, scale=torch.cat([p.scale for p in parts]), zero=torch.cat([p.zero for p in parts]))
    off = None if stats is None else (lost / energy) ** 0.5 if energy else 0.0
    return packed(grid, torch.cat(whole), weight, off)


@torch.inference_mode()
def quantise_model(shape: Shape, read: Read, recipe: Recipe, text: Sequence[Tensor] = ()) -> Iterator[tuple[str, Tensor | QuantisedLinear]]:
    """Every tensor of a decoder but its embedding table, layer after layer: linears' weights quantised, the rest float32.

    The rest may have changed: awq and smoothquant fold scales into norms and biases. Of a tied model too there is an `lm_head.weight`,
    a quantised table of its own.

    Args:
        read: Gives rows of a tensor under its Hugging Face name.
        text: Token ids [n] of each calibration sequence; rtn needs none.

    Raises:
        ConfigError: The method needs text and there is none.
        ModelError: As `quantise_linear`, or a token is not in the table.
    """
    if recipe.method != "rtn" and not text:
        raise ConfigError(f"method={recipe.method} looks at what the layers read: give it calibration text, or take method=rtn")
    sizes = dict(tensor_shapes(shape))
    hidden = [] if recipe.method == "rtn" else embedded(shape, read, text)
    for index in range(shape.layers):
        at = f"model.layers.{index}."
        names = [name for name in sizes if name.startswith(at)]
        if not hidden:
            yield from ((name, _plain(name, read, sizes[name][0], recipe)) for name in names)
            continue
        tensors = {name[len(at) :]: read(name, 0, sizes[name][0]).float() for name in names}
        stats = {module: s for fused, s in observe(shape, index, tensors, hidden).items() for module in FUSED[fused]}
        for fold in FOLDS:
            _fold(fold, tensors, stats, recipe, shape.head_dim)
        out: dict[str, Tensor | QuantisedLinear] = {}
        for name in tensors:
            if is_linear(name):
                made = quantise_linear(tensors[name], recipe, stats[name.removesuffix(".weight")])
                out[name], tensors[name] = made, dequantise(made)
            else:
                out[name] = tensors[name]
        hidden = pass_layer(shape, index, tensors, hidden)
        del tensors, stats
        yield from ((at + name, out.pop(name)) for name in list(out))
    yield from _head(shape, read, recipe, hidden)


def _plain(name: str, read: Read, rows: int, recipe: Recipe) -> Tensor | QuantisedLinear:
    tensor = read(name, 0, rows)
    return quantise_linear(tensor, recipe) if is_linear(name) else tensor.float()


def _head(shape: Shape, read: Read, recipe: Recipe, hidden: Sequence[Tensor]) -> Iterator[tuple[str, Tensor | QuantisedLinear]]:
    """The final norm, and the head after it."""
    recipe, source = recipe.of_head, "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    tensors = {"norm.weight": read("model.norm.weight", 0, shape.hidden).float(), "lm_head.weight": read(source, 0, shape.vocab)}
    stats = {}
    if hidden:
        watch = Watch(shape.hidden)
        for h in hidden:
            watch.add(torch.rms_norm(h, (shape.hidden,), tensors["norm.weight"], shape.eps))
        stats["lm_head"] = watch.stats()
        _fold(Fold("norm", ("lm_head",)), tensors, stats, recipe, 1)
    yield "model.norm.weight", tensors["norm.weight"]
    yield "lm_head.weight", quantise_linear(tensors["lm_head.weight"], recipe, stats.get("lm_head"))


def _fold(fold: Fold, tensors: dict[str, Tensor], stats: dict[str, Stats], recipe: Recipe, width: int) -> None:
    """Search this point's scale and put it into `tensors` and `stats`."""
    if recipe.method not in ("awq", "smoothquant"):
        return
    weights = [tensors[f"{reader}.weight"].float() for reader in fold.readers]
    own = stats[fold.readers[0]]
    shared = {"shared": own.mean.numel() // tensors[f"{fold.source}.weight"].shape[0], "width": width}
    if recipe.method == "awq":
        scale = awq_scale(weights, own.mean, own.hessian, recipe.kind, recipe.group, **shared)
    else:
        scale = smooth_scale(weights, own.greatest, **shared)
    tensors.update(folded(tensors, fold, scale, width))
    stats.update(dict.fromkeys(fold.readers, own.scaled(scale)))

"""Runs single layers of the engine's decoder: records statistics of the linears' inputs, and computes the layer's outputs.

Layers run by torch, with attention over whole sequences that stores nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.layer import Layer, make_layer
from fedtune.inference.engine.layout import Fused, Part, linears
from fedtune.inference.engine.linear import Linear
from fedtune.inference.engine.reference.attention import attention, causal_mask, rotate
from fedtune.inference.engine.reference.linears import Fp32, apply
from fedtune.inference.engine.reference.passes import Attend, run_layers
from fedtune.inference.engine.reference.tensors import as_array
from fedtune.inference.engine.rope import Rope, pairs
from fedtune.inference.engine.shape import Shape
from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.weights import Read
from fedtune.storage.heap import give_back

__all__ = ["Prefix", "Stats", "InputStats", "embedded", "observe", "pass_layer", "prefix_of"]

Prefix = tuple[Tensor, Tensor]  # keys and values [t, Hkv, D] of a layer's virtual tokens, as in packages
_STRETCH = 1 << 19  # numbers of the table that are read at once
_ROWS = 256  # tokens per pass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of the inputs X [n, K] of a linear.

    Attributes:
        hessian: XᵀX / n [K, K].
        mean, greatest: Mean and maximum of |x| per channel, [K].
    """

    hessian: Tensor
    mean: Tensor
    greatest: Tensor

    def scaled(self, scale: Tensor) -> "Stats":
        """The statistics of the inputs divided by a scale [K]."""
        return Stats(hessian=(self.hessian / scale[:, None]).div_(scale), mean=self.mean / scale, greatest=self.greatest / scale)


def embedded(shape: Shape, read: Read, text: Sequence[Tensor], before: Tensor | None = None, folder: Path | None = None) -> Hidden:
    """Return the hidden states of token sequences [n] before the first layer; the embedding table is read in parts.

    Args:
        before: [t, d] embeddings of virtual tokens before each sequence.
        folder: Folder of `Hidden`.

    Raises:
        ModelError: A token id is out of range.
    """
    ids = torch.cat([t.flatten() for t in text])
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= shape.vocab:
        raise ModelError(f"the text has token ids out of range 0..{shape.vocab - 1}: encode it with the model's own tokenizer")
    more = 0 if before is None else len(before)
    out = Hidden([t.numel() + more for t in text], shape.hidden, folder)
    places = torch.cat([torch.arange(start + more, end) for start, end in zip(out.starts, out.starts[1:], strict=False)]).tolist()
    if before is not None:
        for start in out.starts[:-1]:
            out.put(start, before.float())
    for first in range(0, shape.vocab, step := max(_STRETCH // shape.hidden, 1)):
        chosen = (ids >= first) & (ids < first + step)
        if chosen.any():
            table = read("model.embed_tokens.weight", first, min(first + step, shape.vocab)).float() * shape.embed_scale
            for i in chosen.nonzero()[:, 0].tolist():
                out.put(places[i], table[ids[i] - first])
    return out


class InputStats:
    """Accumulates statistics of the inputs [n, K] of a linear."""

    def __init__(self, columns: int) -> None:
        self._hessian, self._n = torch.zeros(columns, columns), 0
        self._sum, self._greatest = torch.zeros(columns), torch.zeros(columns)

    def add(self, x: Tensor) -> None:
        self._hessian.addmm_(x.T, x)
        size = x.abs()
        self._sum += size.sum(0)
        self._greatest = torch.maximum(self._greatest, size.amax(0))
        self._n += x.shape[0]

    def stats(self) -> Stats:
        """Return the statistics. Call it once: sums become means in place."""
        n = max(self._n, 1)
        return Stats(hessian=self._hessian.div_(n), mean=self._sum.div_(n), greatest=self._greatest)


def over_whole(shape: Shape, prefix: Prefix | None) -> Attend:
    """Attention of whole sequences after a prefix, for `run_layers`."""

    def attend(cache: object, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        n, window, before = q.shape[0], shape.windows[layer], 0
        if prefix is not None:  # its keys are not rotated
            keys, values = prefix
            before = len(keys)
            k = torch.cat([keys[..., pairs(1, shape.head_dim, shape.rotary)], rotate(rope, k, before)])
            v = torch.cat([values, v])
        else:
            k = rotate(rope, k, 0)
        first = 0 if window is None else max(0, before - window + 1)  # the oldest token that the first query sees
        whole = not before and (window is None or n <= window)
        mask = None if whole or n == 1 else causal_mask(n, n + before - first, window)
        k, v = k[first:].transpose(0, 1), v[first:].transpose(0, 1)
        return attention(rotate(rope, q, before), k, v, mask, causal=whole and n > 1, cap=shape.attention_cap)

    return attend


def build(shape: Shape, tensors: Mapping[str, Tensor]) -> Layer:
    """Build the decoder's layer from a checkpoint's, in float32.

    Args:
        tensors: Tensors of one layer, named without `model.layers.N.` (`mlp.up_proj.weight` …).
    """

    def joined(parts: Sequence[Part], kind: str) -> Tensor:
        """Concatenate tensors one by one, so that they are not all in memory beside the result."""
        out, end = torch.empty(0), 0
        for part in parts:
            tensor = tensors[f"{part.module}.{kind}"]
            tensor = tensor if part.order is None else tensor[torch.from_numpy(part.order)]
            if len(parts) == 1:
                return tensor
            out = out if end else torch.empty(sum(p.rows for p in parts), *tensor.shape[1:])
            out[end : end + len(tensor)] = tensor
            end += len(tensor)
        return out

    def fused(name: str, how: Fused) -> Linear:
        whole = {kind: joined(how.parts, kind) for kind in ("weight", "bias") if kind == "weight" or how.bias}
        return Fp32(whole, n_in=how.columns, n_out=len(whole["weight"]))

    made = {name: fused(name, how) for name, how in linears(shape).items()}
    return make_layer(shape, made, lambda name: as_array(tensors[f"{name}.weight"].float()))


def prefix_of(virtual: Mapping[str, Tensor], index: int) -> Prefix | None:
    """A layer's part of `prefix.k` and `prefix.v` [L, t, Hkv, D]; None without a prefix."""
    return (virtual["prefix.k"][index].float(), virtual["prefix.v"][index].float()) if "prefix.k" in virtual else None


def observe(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Hidden, prefix: Prefix | None = None) -> dict[str, Stats]:
    """Return input statistics of each of the decoder's linears of the layer, over the hidden states [n, d] before the layer."""
    layer, watched = build(shape, tensors), {name: InputStats(how.columns) for name, how in linears(shape).items()}
    names = {id(getattr(layer, name)): name for name in watched}

    def observed(linear: Linear, x: Tensor) -> Tensor:
        watched[names[id(linear)]].add(x)
        return apply(linear, x)

    _run(shape, index, layer, hidden, prefix, observed)
    return {name: watch.stats() for name, watch in watched.items()}


def pass_layer(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Hidden, prefix: Prefix | None = None) -> Hidden:
    """Run the layer on the hidden states, in place."""
    _run(shape, index, build(shape, tensors), hidden, prefix)
    return hidden


def _run(
    shape: Shape, index: int, layer: Layer, hidden: Hidden, prefix: Prefix | None,
    observed: Callable[[Linear, Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """Run the layer; the hidden states change, unless its linears are observed."""
    rope, attend = Rope(shape, shape.rope_of(index)), over_whole(shape, prefix)
    give_back()
    for first, lengths in hidden.batches(_ROWS):
        rows = hidden.rows(first, first + sum(lengths))
        spans = [Span(FullCache(shape, n), n) for n in lengths]
        out = run_layers(shape, [(index, layer, rope)], rows, spans, attend=attend, linear=observed or apply)
        if observed is None:
            hidden.put(first, out)

"""Runs single layers of the engine's decoder: records statistics of the linears' inputs, and computes the layer's outputs.

The decoder is unchanged: its linears are wrapped, and a cache that stores nothing is used for whole sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Cache, Span, attention, causal_mask
from fedtune.inference.engine.decoder import Decoder
from fedtune.inference.engine.layer import Layer, make_layer
from fedtune.inference.engine.layout import Fused, Part, linears
from fedtune.inference.engine.linear import Linear, linear_from_tensors
from fedtune.inference.engine.rope import Rope, pairs
from fedtune.inference.engine.shape import Shape
from fedtune.inference.quantize.heap import give_back
from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.weights import Read

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


class ObservedLinear(Linear):
    """A linear that records statistics of its inputs."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.parts, n_in=linear.n_in, n_out=linear.n_out, group=linear.group)
        self.kind, self._linear = linear.kind, linear
        self.watch = InputStats(linear.n_in)

    def __call__(self, x: Tensor) -> Tensor:
        self.watch.add(x)
        return self._linear(x)


class NoCache(Cache):
    """A cache that stores nothing, for whole sequences after a prefix."""

    def __init__(self, shape: Shape, limit: int, prefix: Prefix | None) -> None:
        super().__init__(shape, limit)
        self._prefix = prefix

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        n, window, before = q.shape[0], self.shape.windows[layer], 0
        if self._prefix is not None:  # its keys are not rotated
            keys, values = self._prefix
            before = len(keys)
            k, v = torch.cat([keys[..., pairs(1, self.shape.head_dim, self.shape.rotary)], rope.rotate(k, before)]), torch.cat([values, v])
        else:
            k = rope.rotate(k, 0)
        first = 0 if window is None else max(0, before - window + 1)  # the oldest token that the first query sees
        whole = not before and (window is None or n <= window)
        mask = None if whole or n == 1 else causal_mask(n, n + before - first, window)
        k, v = k[first:].transpose(0, 1), v[first:].transpose(0, 1)
        return attention(rope.rotate(q, before), k, v, mask, causal=whole and n > 1, cap=self.shape.attention_cap)

    @property
    def nbytes(self) -> int:
        return 0


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
            tensor = tensor if part.order is None else tensor[part.order]
            if len(parts) == 1:
                return tensor
            out = out if end else torch.empty(sum(p.rows for p in parts), *tensor.shape[1:])
            out[end : end + len(tensor)] = tensor
            end += len(tensor)
        return out

    def fused(name: str, how: Fused) -> Linear:
        whole = {kind: joined(how.parts, kind) for kind in ("weight", "bias") if kind == "weight" or how.bias}
        return linear_from_tensors("fp32", whole, n_in=how.columns, name=name)

    return make_layer(shape, {name: fused(name, how) for name, how in linears(shape).items()}, lambda name: tensors[f"{name}.weight"])


def prefix_of(virtual: Mapping[str, Tensor], index: int) -> Prefix | None:
    """A layer's part of `prefix.k` and `prefix.v` [L, t, Hkv, D]; None without a prefix."""
    return (virtual["prefix.k"][index].float(), virtual["prefix.v"][index].float()) if "prefix.k" in virtual else None


def observe(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Hidden, prefix: Prefix | None = None) -> dict[str, Stats]:
    """Return input statistics of each of the decoder's linears of the layer, over the hidden states [n, d] before the layer."""
    layer = build(shape, tensors)
    watched = {name: ObservedLinear(getattr(layer, name)) for name in linears(shape)}
    for name, linear in watched.items():
        setattr(layer, name, linear)
    _run(shape, index, layer, hidden, prefix, keep=False)
    return {name: linear.watch.stats() for name, linear in watched.items()}


def pass_layer(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Hidden, prefix: Prefix | None = None) -> Hidden:
    """Run the layer on the hidden states, in place."""
    _run(shape, index, build(shape, tensors), hidden, prefix, keep=True)
    return hidden


def _run(shape: Shape, index: int, layer: Layer, hidden: Hidden, prefix: Prefix | None, keep: bool) -> None:
    decoder = Decoder(shape, torch.empty(0, shape.hidden), [layer] * (index + 1), torch.empty(0), layer.down)
    give_back()
    for first, lengths in hidden.batches(_ROWS):
        spans = [Span(NoCache(shape, n, prefix), n) for n in lengths]
        out = decoder.run(hidden.rows(first, first + sum(lengths)), spans, first=index, last=index + 1)
        if keep:
            hidden.put(first, out)

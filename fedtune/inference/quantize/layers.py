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
from fedtune.inference.engine.decoder import Decoder, Layer
from fedtune.inference.engine.linear import Linear, linear_from_tensors
from fedtune.inference.engine.rope import Rope, pairs
from fedtune.inference.engine.shape import Shape
from fedtune.inference.quantize.heap import give_back
from fedtune.inference.quantize.hidden import Hidden
from fedtune.inference.quantize.weights import Read

__all__ = ["FUSED", "Prefix", "Stats", "InputStats", "embedded", "observe", "pass_layer", "prefix_of"]

FUSED: Mapping[str, tuple[str, ...]] = {  # the decoder's linears → the checkpoint's, which share their inputs
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
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
            table = read("model.embed_tokens.weight", first, min(first + step, shape.vocab)).float()
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
        self._linear = linear
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
            k, v = torch.cat([keys[..., pairs(1, self.shape.head_dim)], rope.rotate(k, before)]), torch.cat([values, v])
        else:
            k = rope.rotate(k, 0)
        first = 0 if window is None else max(0, before - window + 1)  # the oldest token that the first query sees
        whole = not before and (window is None or n <= window)
        mask = None if whole or n == 1 else causal_mask(n, n + before - first, window)
        k, v = k[first:].transpose(0, 1), v[first:].transpose(0, 1)
        return attention(rope.rotate(q, before), k, v, mask, causal=whole and n > 1)

    @property
    def nbytes(self) -> int:
        return 0


def build(shape: Shape, tensors: Mapping[str, Tensor]) -> Layer:
    """Build the decoder's layer from a checkpoint's, in float32.

    Args:
        tensors: Tensors of one layer, named without `model.layers.N.` (`mlp.up_proj.weight` …).
    """
    orders = {"self_attn.q_proj": pairs(shape.heads, shape.head_dim), "self_attn.k_proj": pairs(shape.kv_heads, shape.head_dim)}

    outputs = (
        shape.heads * shape.head_dim,
        *(shape.kv_heads * shape.head_dim,) * 2,
        shape.hidden,
        *(shape.intermediate,) * 2,
        shape.hidden,
    )
    rows = dict(zip((module for modules in FUSED.values() for module in modules), outputs, strict=True))

    def joined(modules: Sequence[str], part: str) -> Tensor:
        """Concatenate tensors one by one, so that they are not all in memory beside the result."""
        out, end = torch.empty(0), 0
        for module in modules:
            tensor = tensors[f"{module}.{part}"]
            tensor = tensor[orders[module]] if module in orders else tensor
            if len(modules) == 1:
                return tensor
            out = out if end else torch.empty(sum(rows[m] for m in modules), *tensor.shape[1:])
            out[end : end + len(tensor)] = tensor
            end += len(tensor)
        return out

    def fused(name: str) -> Linear:
        found = {part: [m for m in FUSED[name] if f"{m}.{part}" in tensors] for part in ("weight", "bias")}
        whole = {part: joined(modules, part) for part, modules in found.items() if modules}
        return linear_from_tensors("fp32", whole, n_in=whole["weight"].shape[1], name=name)

    turned = pairs(1, shape.head_dim)
    return Layer(
        norm=tensors["input_layernorm.weight"],
        qkv=fused("qkv"),
        o=fused("o"),
        q_norm=tensors["self_attn.q_norm.weight"][turned] if shape.qk_norm else None,
        k_norm=tensors["self_attn.k_norm.weight"][turned] if shape.qk_norm else None,
        mlp_norm=tensors["post_attention_layernorm.weight"],
        gate_up=fused("gate_up"),
        down=fused("down"),
    )


def prefix_of(virtual: Mapping[str, Tensor], index: int) -> Prefix | None:
    """A layer's part of `prefix.k` and `prefix.v` [L, t, Hkv, D]; None without a prefix."""
    return (virtual["prefix.k"][index].float(), virtual["prefix.v"][index].float()) if "prefix.k" in virtual else None


def observe(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Hidden, prefix: Prefix | None = None) -> dict[str, Stats]:
    """Return input statistics of each of the layer's `FUSED` linears, over the hidden states [n, d] before the layer."""
    layer = build(shape, tensors)
    watched = {name: ObservedLinear(getattr(layer, name)) for name in FUSED}
    for name, linear in watched.items():
        setattr(layer, name, linear)
    _run(shape, index, layer, hidden, prefix, keep=False)
    return {name: linear.watch.stats() for name, linear in watched.items()}


def pass_layer(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Hidden, prefix: Prefix | None = None) -> Hidden:
    """Run the layer on the hidden states, in place."""
    _run(shape, index, build(shape, tensors), hidden, prefix, keep=True)
    return hidden


def _run(shape: Shape, index: int, layer: Layer, hidden: Hidden, prefix: Prefix | None, keep: bool) -> None:
    decoder = Decoder(shape, torch.empty(0, shape.hidden), [layer] * (index + 1), layer.norm, layer.down)
    give_back()
    for first, lengths in hidden.batches(_ROWS):
        spans = [Span(NoCache(shape, n, prefix), n) for n in lengths]
        out = decoder.run(hidden.rows(first, first + sum(lengths)), spans, first=index, last=index + 1)
        if keep:
            hidden.put(first, out)

"""One layer at a time through the engine's decoder: what its linears read, and what comes out of it.

Nothing of the decoder is changed: its linears are wrapped, and a cache that keeps nothing lets whole sequences pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Cache, Span, attention, causal_mask
from fedtune.inference.engine.decoder import Decoder, Layer
from fedtune.inference.engine.linear import Linear, linear_from_tensors
from fedtune.inference.engine.rope import Rope, pairs
from fedtune.inference.engine.shape import Shape

__all__ = ["FUSED", "Read", "Stats", "Watch", "embedded", "observe", "pass_layer"]

FUSED: Mapping[str, tuple[str, ...]] = {  # the decoder's linears → the checkpoint's, which share their inputs
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
Read = Callable[[str, int, int], Tensor]  # name, first and last row of a tensor → those rows
_STRETCH = 1 << 22  # numbers of the table that are read at once
_ROWS = 2048  # tokens of a pass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What is kept of the inputs X [n, K] of a linear.

    Attributes:
        hessian: XᵀX / n [K, K].
        mean, greatest: Of |x|, for each channel [K].
    """

    hessian: Tensor
    mean: Tensor
    greatest: Tensor

    def scaled(self, scale: Tensor) -> "Stats":
        """Of the inputs divided by a scale [K]."""
        return Stats(hessian=self.hessian / torch.outer(scale, scale), mean=self.mean / scale, greatest=self.greatest / scale)


def embedded(shape: Shape, read: Read, text: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states [n, d] of sequences of tokens [n] before the first layer, of a table of which only a part is read at once.

    Raises:
        ModelError: A token is not in the table.
    """
    ids = torch.cat([t.flatten() for t in text])
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= shape.vocab:
        raise ModelError(f"the text has tokens outside the model's {shape.vocab}: encode it with the model's own tokenizer")
    out = torch.empty(len(ids), shape.hidden)
    for first in range(0, shape.vocab, step := max(_STRETCH // shape.hidden, 1)):
        chosen = (ids >= first) & (ids < first + step)
        if chosen.any():
            out[chosen] = read("model.embed_tokens.weight", first, min(first + step, shape.vocab)).float()[ids[chosen] - first]
    return list(out.split([t.numel() for t in text]))


class Watch:
    """Takes note of the inputs [n, K] of a linear."""

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
        """Once, at the end: the sums become the means in place."""
        n = max(self._n, 1)
        return Stats(hessian=self._hessian.div_(n), mean=self._sum.div_(n), greatest=self._greatest)


class Watched(Linear):
    """A linear whose inputs are taken note of."""

    def __init__(self, linear: Linear) -> None:
        self._linear, self.n_in, self.n_out, self.nbytes = linear, linear.n_in, linear.n_out, linear.nbytes
        self.watch = Watch(linear.n_in)

    def __call__(self, x: Tensor) -> Tensor:
        self.watch.add(x)
        return self._linear(x)


class Passing(Cache):
    """For sequences that pass a layer as a whole: keeps nothing."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
        n, window = q.shape[0], self.shape.windows[layer]
        q, k = rope.rotate(q, 0), rope.rotate(k, 0).transpose(0, 1)
        mask = causal_mask(n, n, window) if window is not None and n > window else None
        return attention(q, k, v.transpose(0, 1), mask, causal=mask is None and n > 1)

    @property
    def nbytes(self) -> int:
        return 0


def build(shape: Shape, tensors: Mapping[str, Tensor]) -> Layer:
    """The decoder's layer of a checkpoint's, float32.

    Args:
        tensors: Of one layer, without `model.layers.N.` (`mlp.up_proj.weight` …).
    """
    orders = {"self_attn.q_proj": pairs(shape.heads, shape.head_dim), "self_attn.k_proj": pairs(shape.kv_heads, shape.head_dim)}

    def fused(name: str) -> Linear:
        found: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for module in FUSED[name]:
            for part in found:
                if (tensor := tensors.get(f"{module}.{part}")) is not None:
                    found[part].append(tensor[orders[module]] if module in orders else tensor)
        whole = {part: torch.cat(several) for part, several in found.items() if several}
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


def observe(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Sequence[Tensor]) -> dict[str, Stats]:
    """Stats of the inputs of each of the layer's `FUSED` linears, over these sequences of hidden states [n, d] before the layer."""
    layer = build(shape, tensors)
    watched = {name: Watched(getattr(layer, name)) for name in FUSED}
    for name, linear in watched.items():
        setattr(layer, name, linear)
    _run(shape, index, layer, hidden)
    return {name: linear.watch.stats() for name, linear in watched.items()}


def pass_layer(shape: Shape, index: int, tensors: Mapping[str, Tensor], hidden: Sequence[Tensor]) -> list[Tensor]:
    """The sequences' hidden states [n, d] after the layer."""
    return _run(shape, index, build(shape, tensors), hidden)


def _run(shape: Shape, index: int, layer: Layer, hidden: Sequence[Tensor]) -> list[Tensor]:
    decoder = Decoder(shape, torch.empty(0, shape.hidden), [layer] * (index + 1), layer.norm, layer.down)
    out: list[Tensor] = []
    while len(out) < len(hidden):
        batch = [hidden[len(out)]]
        while len(out) + len(batch) < len(hidden) and sum(map(len, batch)) + len(hidden[len(out) + len(batch)]) <= _ROWS:
            batch.append(hidden[len(out) + len(batch)])
        spans = [Span(Passing(shape, len(h)), len(h)) for h in batch]
        out += decoder.run(torch.cat(batch), spans, first=index, last=index + 1).split([len(h) for h in batch])
    return out

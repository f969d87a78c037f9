"""A Llama-family decoder on flat rows.

`forward` is a complete pass. Speculation uses its parts: `run(..., last=E)` and `logits` make an early exit; after `cache.crop`,
`run(hidden, spans, first=E)` continues from the exit's hidden states.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.linear import Linear
from fedtune.inference.engine.lora import Lora, add_all
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape


@dataclass(slots=True, kw_only=True)
class Layer:
    """One transformer block: norms float32, linears fused."""

    norm: Tensor  # [d]
    qkv: Linear  # d -> (H + 2 Hkv) D; rows of q and k in pairs
    o: Linear
    q_norm: Tensor | None = None  # [D], in pairs
    k_norm: Tensor | None = None
    mlp_norm: Tensor  # [d]
    gate_up: Linear  # d -> 2 * intermediate
    down: Linear


class Decoder:
    """Embedding, layers, final norm and head."""

    def __init__(self, shape: Shape, embed: Tensor, layers: Sequence[Layer], norm: Tensor, head: Linear) -> None:
        self.shape = shape
        self.embedding = embed  # [V, d], in its stored dtype
        self.layers = list(layers)
        self.norm = norm
        self.head = head
        self.rope = Rope(shape)
        self.adapters: dict[str, Lora] = {}

    @torch.inference_mode()
    def forward(self, ids: Tensor | None, spans: Sequence[Span], *, embeds: Tensor | None = None, layers: int | None = None) -> Tensor:
        """Run a pass and return the logits that its spans keep.

        Args:
            ids: [rows] token ids, the spans' tokens concatenated; None with `embeds`.
            spans: One per sequence; their caches advance.
            embeds: [rows, d] embeddings instead of ids.
            layers: Number of layers to run (early exit: final norm and head on their output).

        Returns:
            [rows kept, V] float32.
        """
        if embeds is None:
            if ids is None:
                raise ModelError("a pass needs ids or embeds")
            embeds = self.embed(ids)
        return self.logits(self.run(embeds, spans, last=layers), spans)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """[n] -> [n, d] float32."""
        try:
            return self.embedding[ids].float()
        except IndexError:
            raise ModelError(f"token id out of range 0..{self.shape.vocab - 1}: the tokenizer does not match this model") from None

    @torch.inference_mode()
    def run(self, hidden: Tensor, spans: Sequence[Span], *, first: int = 0, last: int | None = None) -> Tensor:
        """Run layers first..last-1 on [rows, d] hidden states; stores keys and values and advances every span's cache.

        Raises:
            CacheError: A cache is full; then no cache has advanced.
            ModelError: Rows and spans do not match, or a span's adapter does not exist.
        """
        shape, rope, rows = self.shape, self.rope, hidden.shape[0]
        if rows != sum(span.n for span in spans) or any(span.n < 1 for span in spans):
            raise ModelError(f"{rows} rows do not match spans of {[span.n for span in spans]} tokens: each row belongs to one span")
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_dim
        parts, inner = (heads, kv_heads, kv_heads), shape.intermediate
        kind = type(spans[0].cache)
        attend = (kind if all(type(span.cache) is kind for span in spans) else Cache).attend_many
        loras = self._loras(spans) if any(span.adapter is not None for span in spans) else None
        last = shape.layers if last is None else last
        if not 0 <= first <= last <= shape.layers:
            raise ModelError(f"the model has {shape.layers} layers: it cannot run {first} to {last}")
        for i in range(first, last):
            layer = self.layers[i]
            x = _rms_norm(hidden, layer.norm, shape.eps)
            qkv = layer.qkv(x)
            if loras:
                add_all(loras, (i, "qkv"), x, qkv)
            q, k, v = qkv.view(rows, -1, width).split(parts, 1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q = torch.rms_norm(q, (width,), layer.q_norm, shape.eps)
                k = torch.rms_norm(k, (width,), layer.k_norm, shape.eps)
            x = attend(i, spans, q, k, v, rope).reshape(rows, heads * width)
            y = layer.o(x)
            if loras:
                add_all(loras, (i, "o"), x, y)
            hidden = hidden + y
            x = _rms_norm(hidden, layer.mlp_norm, shape.eps)
            y = layer.gate_up(x)
            if loras:
                add_all(loras, (i, "gate_up"), x, y)
            gate, up = y.split(inner, 1)
            x = silu(gate).mul_(up)
            y = layer.down(x)
            if loras:
                add_all(loras, (i, "down"), x, y)
            hidden = hidden.add_(y)
        for span in spans:
            span.cache.advance(span.n)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        """[rows, d] -> [rows kept, V] float32; without spans, all rows."""
        if spans is not None and any(span.keep is not None and span.keep != span.n for span in spans):
            kept, end = [], 0
            for span in spans:
                end += span.n
                kept.append(hidden[end - (span.n if span.keep is None else min(span.keep, span.n)) : end])
            hidden = kept[0] if len(kept) == 1 else torch.cat(kept)
        if not hidden.shape[0]:
            return hidden.new_empty(0, self.shape.vocab)
        return self.head(_rms_norm(hidden, self.norm, self.shape.eps))

    def _loras(self, spans: Sequence[Span]) -> list[tuple[slice, Lora]]:
        """The rows of each adapter; adjacent spans with the same adapter are merged."""
        found: list[tuple[slice, Lora]] = []
        at = 0
        for span in spans:
            if span.adapter is not None:
                if span.adapter not in self.adapters:
                    known = ", ".join(self.adapters) or "none"
                    raise ModelError(f"the model has no adapter named {span.adapter!r}; it has: {known}")
                lora = self.adapters[span.adapter]
                if found and found[-1][1] is lora and found[-1][0].stop == at:
                    found[-1] = slice(found[-1][0].start, at + span.n), lora
                else:
                    found.append((slice(at, at + span.n), lora))
            at += span.n
        return found


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight per row; [n, d] -> [n, d]."""
    if x.shape[0] > 1:
        return torch.rms_norm(x, weight.shape, weight, eps)
    row = x.view(-1)  # decoding: torch.rms_norm runs six small operations, whose overhead dominates
    return torch.mul(x, weight).mul_((torch.dot(row, row).item() / row.shape[0] + eps) ** -0.5)


def parameters_held(decoder: Decoder) -> Mapping[str, int]:
    """Bytes per part, for memory reports."""
    linears = [linear for layer in decoder.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return {"embedding": decoder.embedding.nbytes, "linears": sum(linear.nbytes for linear in linears), "head": decoder.head.nbytes}

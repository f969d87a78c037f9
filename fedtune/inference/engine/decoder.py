"""A Llama-like decoder on flat rows.

`forward` is a complete pass. Speculation uses its parts: `run(..., last=E)` and `logits` make an early exit; after `cache.crop`,
`run(hidden, spans, first=E)` continues from the exit's hidden states.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fedtune.errors import ModelError
from fedtune.inference.engine.caches.base import Cache, Span, soft_cap
from fedtune.inference.engine.layer import Layer
from fedtune.inference.engine.linear import Linear
from fedtune.inference.engine.lora import Lora, add_all
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape
from fedtune.inference.engine.step import NativeStep


class Decoder:
    """Embedding, layers, final norm and head."""

    def __init__(self, shape: Shape, embed: Tensor, layers: Sequence[Layer], norm: Tensor, head: Linear) -> None:
        self.shape = shape
        self.embedding = embed  # [V, d], in its stored dtype
        self.layers = list(layers)
        self.norm = norm
        self.head = head
        kinds = {kind: Rope(shape, kind) for kind in (shape.layer_ropes or (shape.rope,))}
        self.ropes = [kinds[shape.rope_of(layer)] for layer in range(shape.layers)]
        self.adapters: dict[str, Lora] = {}
        self._native: tuple[list[Linear], NativeStep | None] | None = None

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
        return self._pass(embeds, spans, last=layers, logits=True)

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """[n] -> [n, d] float32."""
        try:
            found = self.embedding[ids].float()
            return found if self.shape.embed_scale == 1 else found.mul_(self.shape.embed_scale)
        except IndexError:
            raise ModelError(f"token id out of range 0..{self.shape.vocab - 1}: the tokenizer does not match this model") from None

    @torch.inference_mode()
    def run(self, hidden: Tensor, spans: Sequence[Span], *, first: int = 0, last: int | None = None) -> Tensor:
        """Run layers first..last-1 on [rows, d] hidden states; stores keys and values and advances every span's cache.

        Raises:
            CacheError: A cache is full; then no cache has advanced.
            ModelError: Rows and spans do not match, or a span's adapter does not exist.
        """
        return self._pass(hidden, spans, first=first, last=last)

    def _pass(self, hidden: Tensor, spans: Sequence[Span], *, first: int = 0, last: int | None = None, logits: bool = False) -> Tensor:
        """Run layers; returns their hidden states, or the logits that the spans keep."""
        shape, rows = self.shape, hidden.shape[0]
        if rows != sum(span.n for span in spans) or any(span.n < 1 for span in spans):
            raise ModelError(f"{rows} rows do not match spans of {[span.n for span in spans]} tokens: each row belongs to one span")
        last = shape.layers if last is None else last
        if not 0 <= first <= last <= shape.layers:
            raise ModelError(f"the model has {shape.layers} layers: it cannot run {first} to {last}")
        native, loras = self.native_step(), self._loras(spans)
        places = None if native is None else native.places(spans, loras)
        if native is None or places is None:
            hidden, found = self._run_torch(hidden, spans, loras, first, last), None
        else:
            hidden = hidden.float().contiguous().clone()
            found = native.run(hidden, places, first=first, last=last, kept=kept_rows(spans) if logits and native.has_head else ())
        for span in spans:
            span.cache.advance(span.n)
        if not logits:
            return hidden
        return self.logits(hidden, spans) if found is None else found

    def native_step(self) -> NativeStep | None:
        """The native form of the layers as they are now, or None if torch runs them."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if self._native is None or linears != self._native[0]:
            torch_runs = NativeStep.why_torch(self.shape, self.layers)
            self._native = linears, None if torch_runs else NativeStep(self.shape, self.layers, self.ropes, self.norm, self.head)
        return self._native[1]

    def _run_torch(self, hidden: Tensor, spans: Sequence[Span], adapters: Sequence[Lora | None], first: int, last: int) -> Tensor:
        shape, rows = self.shape, hidden.shape[0]
        heads, kv_heads, width = shape.heads, shape.kv_heads, shape.head_dim
        parts, inner, act = (heads, kv_heads, kv_heads), shape.intermediate, silu if shape.activation == "silu" else _gelu_tanh
        kind = type(spans[0].cache)
        attend = (kind if all(type(span.cache) is kind for span in spans) else Cache).attend_many
        loras = _rows_of(spans, adapters)
        for i in range(first, last):
            layer = self.layers[i]
            x = hidden if layer.norm is None else _rms_norm(hidden, layer.norm, shape.eps)
            qkv = layer.qkv(x)
            if loras:
                add_all(loras, (i, "qkv"), x, qkv)
            q, k, v = qkv.view(rows, -1, width).split(parts, 1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = _head_norm(q, layer.q_norm, shape.eps), _head_norm(k, layer.k_norm, shape.eps)
            if shape.query_scale != 1:
                q = q * shape.query_scale
            x = attend(i, spans, q, k, v, self.ropes[i]).reshape(rows, heads * width)
            y = layer.o(x)
            if loras:
                add_all(loras, (i, "o"), x, y)
            hidden = hidden + (y if layer.o_norm is None else _rms_norm(y, layer.o_norm, shape.eps))
            x = hidden if layer.mlp_norm is None else _rms_norm(hidden, layer.mlp_norm, shape.eps)
            y = layer.gate_up(x)
            if loras:
                add_all(loras, (i, "gate_up"), x, y)
            gate, up = y.split(inner, 1)
            x = act(gate).mul_(up)
            y = layer.down(x)
            if loras:
                add_all(loras, (i, "down"), x, y)
            hidden = hidden.add_(y if layer.down_norm is None else _rms_norm(y, layer.down_norm, shape.eps))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        """[rows, d] -> [rows kept, V] float32; without spans, all rows."""
        if spans is not None and any(span.keep is not None and span.keep != span.n for span in spans):
            hidden = hidden[kept_rows(spans)]
        if not hidden.shape[0]:
            return hidden.new_empty(0, self.shape.vocab)
        return soft_cap(self.head(_rms_norm(hidden, self.norm, self.shape.eps)), self.shape.logit_cap)

    def _loras(self, spans: Sequence[Span]) -> list[Lora | None]:
        """The adapter of each span."""
        for span in spans:
            if span.adapter is not None and span.adapter not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise ModelError(f"the model has no adapter named {span.adapter!r}; it has: {known}")
        return [None if span.adapter is None else self.adapters[span.adapter] for span in spans]


def kept_rows(spans: Sequence[Span]) -> list[int]:
    """The rows of a pass whose logits its spans keep."""
    rows, end = list[int](), 0
    for span in spans:
        end += span.n
        rows += range(end - (span.n if span.keep is None else min(span.keep, span.n)), end)
    return rows


def _rows_of(spans: Sequence[Span], loras: Sequence[Lora | None]) -> list[tuple[slice, Lora]]:
    """The rows of each adapter; adjacent spans with the same adapter are merged."""
    found: list[tuple[slice, Lora]] = []
    at = 0
    for span, lora in zip(spans, loras, strict=True):
        if lora is not None and found and found[-1][1] is lora and found[-1][0].stop == at:
            found[-1] = slice(found[-1][0].start, at + span.n), lora
        elif lora is not None:
            found.append((slice(at, at + span.n), lora))
        at += span.n
    return found


def _gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each head of x [n, H, D] with a weight [D], or of all heads at once with a weight [H D]."""
    if weight.shape[0] == x.shape[2]:
        return torch.rms_norm(x, weight.shape, weight, eps)
    return torch.rms_norm(x.flatten(1), weight.shape, weight, eps).view(x.shape)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight per row; [n, d] -> [n, d]."""
    if x.shape[0] > 1:
        return torch.rms_norm(x, weight.shape, weight, eps)
    row = x.view(-1)  # decoding: torch.rms_norm runs six small operations, whose overhead dominates
    return torch.mul(x, weight).mul_((torch.dot(row, row).item() / row.shape[0] + eps) ** -0.5)


def describe_passes(decoder: Decoder) -> str:
    """What runs the decoder's layers, and why it is torch, as the end of a sentence."""
    why = NativeStep.why_torch(decoder.shape, decoder.layers)
    return f"by torch ({why})" if why else "in native code"


def linears_of(decoder: Decoder) -> list[Linear]:
    """Its linear layers; the last is the head."""
    return [*(linear for layer in decoder.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)), decoder.head]


def parameters_held(decoder: Decoder) -> Mapping[str, int]:
    """Bytes per part, for memory reports."""
    *linears, head = linears_of(decoder)
    return {"embedding": decoder.embedding.nbytes, "linears": sum(linear.nbytes for linear in linears), "head": head.nbytes}

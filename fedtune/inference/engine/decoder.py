"""A Llama-like decoder on flat rows.

`forward` is a complete pass. Speculation uses its parts: `run(..., last=E)` and `logits` make an early exit; after `cache.crop`,
`run(hidden, spans, first=E)` continues from the exit's hidden states.

A pass runs over flat rows: the tokens of all its spans, one span after the other. Linears see all rows at once; attention goes span by
span, so sequences of different lengths need no padding.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.inference.engine.bfloat16 import Array, as_float32
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.layer import Layer
from fedtune.inference.engine.linear import Linear, Native
from fedtune.inference.engine.lora import Lora
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape
from fedtune.inference.engine.step import NativeStep

Floats = NDArray[np.float32]


class Decoder:
    """Embedding, layers, final norm and head."""

    def __init__(self, shape: Shape, embed: Array, layers: Sequence[Layer], norm: Floats, head: Linear) -> None:
        self.shape = shape
        self.embedding = embed  # [V, d], in its stored dtype
        self.layers = list(layers)
        self.norm = norm
        self.head = head
        kinds = {kind: Rope(shape, kind) for kind in (shape.layer_ropes or (shape.rope,))}
        self.ropes = [kinds[shape.rope_of(layer)] for layer in range(shape.layers)]
        self.adapters: dict[str, Lora] = {}
        self._native: tuple[list[Linear], NativeStep | None] | None = None

    def forward(
        self, ids: Sequence[int] | NDArray[np.int64] | None, spans: Sequence[Span], *, embeds: Floats | None = None,
        layers: int | None = None,
    ) -> Floats:  # fmt: skip
        """Run a pass and return the logits that its spans keep.

        Args:
            ids: [rows] token ids, the spans' tokens concatenated; None with `embeds`.
            spans: One per sequence; their caches advance.
            embeds: [rows, d] embeddings instead of ids.
            layers: Number of layers to run (early exit: final norm and head on their output).

        Returns:
            [rows kept, V].
        """
        if embeds is None:
            if ids is None:
                raise ModelError("a pass needs ids or embeds")
            embeds = self.embed(ids)
        return self._passes(embeds, spans, 0, layers, logits=True)

    def embed(self, ids: Sequence[int] | NDArray[np.int64]) -> Floats:
        """[n] -> [n, d]."""
        ids = np.asarray(ids, np.int64)
        if ((ids < 0) | (ids >= len(self.embedding))).any():
            raise ModelError(f"token id out of range 0..{self.shape.vocab - 1}: the tokenizer does not match this model")
        found = as_float32(self.embedding[ids])
        return found if self.shape.embed_scale == 1 else found * np.float32(self.shape.embed_scale)

    def run(self, hidden: Floats, spans: Sequence[Span], *, first: int = 0, last: int | None = None) -> Floats:
        """Run layers first..last-1 on [rows, d] hidden states; stores keys and values and advances every span's cache.

        Raises:
            CacheError: A cache is full; then no cache has advanced.
            ModelError: Rows and spans do not match, or a span's adapter does not exist.
        """
        return self._passes(hidden, spans, first, last, logits=False)

    def _passes(self, hidden: Floats, spans: Sequence[Span], first: int, last: int | None, *, logits: bool) -> Floats:
        """Run layers; returns their hidden states, or the logits that the spans keep. Most caches need one pass for this."""
        rows = len(hidden)
        if rows != sum(span.n for span in spans) or any(span.n < 1 for span in spans):
            raise ModelError(f"{rows} rows do not match spans of {[span.n for span in spans]} tokens: each row belongs to one span")
        last = self.shape.layers if last is None else last
        if not 0 <= first <= last <= self.shape.layers:
            raise ModelError(f"the model has {self.shape.layers} layers: it cannot run {first} to {last}")
        loras = [self.lora_of(span) for span in spans]
        whole = all(span.cache.most(span.n) == span.n for span in spans)
        if any(span.forks for span in spans) and not (whole and self.native_step()):
            raise ModelError("forks need native code, and a cache that takes all rows in one pass")
        if whole:
            return self._pass(hidden, spans, loras, first, last, logits)
        for span in spans:
            span.cache.require_capacity(span.n)
        out = np.empty_like(hidden, np.float32)
        starts = np.cumsum([0, *(span.n for span in spans)])
        for span, start, lora in zip(spans, starts.tolist(), loras, strict=False):
            done = 0
            while done < span.n:
                n = span.cache.most(span.n - done)
                part = slice(start + done, start + done + n)
                out[part] = self._pass(hidden[part], [Span(span.cache, n, adapter=span.adapter)], [lora], first, last, logits=False)
                done += n
        return self.logits(out, spans) if logits else out

    def _pass(self, hidden: Floats, spans: Sequence[Span], loras: Sequence[Lora | None], first: int, last: int, logits: bool) -> Floats:
        native = self.native_step()
        for span in spans:
            span.cache.require_capacity(span.n)
        for kind in dict.fromkeys(type(span.cache) for span in spans):
            kind.prepare_all([span for span in spans if type(span.cache) is kind])
        hidden, found = np.array(hidden, np.float32, order="C"), None
        if native is None:
            from fedtune.inference.engine.reference import passes  # lazy: it loads torch

            parts = list(zip(range(first, last), self.layers[first:last], self.ropes[first:last], strict=True))
            hidden = passes.as_array(passes.run_layers(self.shape, parts, passes.as_tensor(hidden), spans, rows_of(spans, loras)))
        else:
            kept = kept_rows(spans) if logits and native.has_head else ()
            found = native.run(hidden, spans, loras, first=first, last=last, kept=kept)
        for span in spans:
            span.cache.advance(span.n)
        if not logits:
            return hidden
        return self.logits(hidden, spans) if found is None else found

    def native_step(self) -> NativeStep | None:
        """The native form of the linears as they are now, or None if torch runs them."""
        linears = linears_of(self)
        if self._native is None or linears != self._native[0]:
            torch_runs = NativeStep.why_torch(self.shape, self.layers)
            self._native = linears, None if torch_runs else NativeStep(self.shape, self.layers, self.ropes, self.norm, self.head)
        return self._native[1]

    def logits(self, hidden: Floats, spans: Sequence[Span] | None = None) -> Floats:
        """[rows, d] -> [rows kept, V]; without spans, all rows."""
        if spans is not None and any(span.keep is not None and span.keep != span.n for span in spans):
            hidden = hidden[kept_rows(spans)]
        if not len(hidden):
            return np.empty((0, self.shape.vocab), np.float32)
        if not isinstance(self.head, Native):
            from fedtune.inference.engine.reference import passes

            return passes.run_head(self.shape, self.norm, self.head, hidden)
        with np.errstate(over="ignore", invalid="ignore"):  # as in native code: a damaged model's scores are NaN
            squares = np.square(hidden, dtype=np.float32).mean(1, keepdims=True)
            normed = hidden / np.sqrt(squares + np.float32(self.shape.eps)) * self.norm
        out = self.head(normed)
        cap = self.shape.logit_cap
        return out if cap is None else np.tanh(out / np.float32(cap)) * np.float32(cap)

    def lora_of(self, span: Span) -> Lora | None:
        """The span's adapter."""
        if span.adapter is not None and span.adapter not in self.adapters:
            raise ModelError(f"the model has no adapter named {span.adapter!r}; it has: {', '.join(self.adapters) or 'none'}")
        return None if span.adapter is None else self.adapters[span.adapter]


def rows_of(spans: Sequence[Span], loras: Sequence[Lora | None]) -> list[tuple[slice, Lora]]:
    """The rows of each adapter; adjacent spans with the same adapter are merged."""
    found: list[tuple[slice, Lora]] = []
    at = 0
    for span, lora in zip(spans, loras, strict=True):
        if lora is not None:
            if found and found[-1][1] is lora and found[-1][0].stop == at:
                found[-1] = slice(found[-1][0].start, at + span.n), lora
            else:
                found.append((slice(at, at + span.n), lora))
        at += span.n
    return found


def kept_rows(spans: Sequence[Span]) -> list[int]:
    """The rows of a pass whose logits its spans keep."""
    rows, end = list[int](), 0
    for span in spans:
        end += span.n
        rows += range(end - (span.n if span.keep is None else min(span.keep, span.n)), end)
    return rows


def describe_passes(decoder: Decoder) -> str:
    """Whether native code or torch runs the decoder's layers, as the end of a sentence; if torch does, also why."""
    why = NativeStep.why_torch(decoder.shape, decoder.layers)
    return f"by torch ({why})" if why else "in native code"


def linears_of(decoder: Decoder) -> list[Linear]:
    """Its linear layers; the last is the head."""
    return [*(linear for layer in decoder.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)), decoder.head]


def parameters_held(decoder: Decoder) -> Mapping[str, int]:
    """Bytes per part, for memory reports."""
    *linears, head = linears_of(decoder)
    return {"embedding": decoder.embedding.nbytes, "linears": sum(linear.nbytes for linear in linears), "head": head.nbytes}

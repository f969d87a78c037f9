"""Passes through the decoder in native code: one call from Python runs the layers, the final norm and the head.

It runs if all linears of the layers are native. Otherwise torch does (`reference.passes`); `NativeStep.why_torch` says why.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.bfloat16 import Array
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.layer import Layer
from fedtune.inference.engine.linear import Linear, Native
from fedtune.inference.engine.lora import Lora
from fedtune.inference.engine.native.library import Kernels
from fedtune.inference.engine.native.structures import DecoderStructure, DraftStructure, LayerStructure, PassStructure, SpanStructure
from fedtune.inference.engine.rope import Rope
from fedtune.inference.engine.shape import Shape
from fedtune.inference.engine.threads import threads

__all__ = ["NativeStep"]

_LINEARS = ("qkv", "o", "gate_up", "down")
_NORMS = ("norm", "q_norm", "k_norm", "o_norm", "mlp_norm", "down_norm")
_WIDEST, _MOST_SHARED = 512, 128  # of kernels.h: channels of a head, and query heads for each key head
Floats = NDArray[np.float32]


class NativeStep:
    """The native form of a decoder. It holds the layers' weights as long as it lives."""

    def __init__(self, shape: Shape, layers: Sequence[Layer], ropes: Sequence[Rope], norm: Floats, head: Linear) -> None:
        self._kernels, self._head, self._shape = _kernels(layers[0]), head, shape
        self._kinds = list(dict.fromkeys(ropes))
        self._held: list[Any] = [list(layers)]
        made = (LayerStructure * shape.layers)()
        for own, layer, rope, window in zip(made, layers, ropes, shape.windows, strict=True):
            for name in _LINEARS:
                setattr(own, name, getattr(layer, name).weights)
            for name in _NORMS:
                if (weight := getattr(layer, name)) is not None:
                    setattr(own, name, self._address(weight))
            own.window, own.turns = window or 0, self._kinds.index(rope)
        self._decoder = DecoderStructure(
            hidden=shape.hidden, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate=shape.intermediate,
            layers=shape.layers, whole_norms=shape.qk_norm_whole, gelu=shape.activation != "silu", eps=shape.eps,
            query_scale=shape.query_scale * shape.head_dim**-0.5, attention_cap=shape.attention_cap or 0, logit_cap=shape.logit_cap or 0,
            layer=made, norm=self._address(norm),
        )  # fmt: skip
        if isinstance(head, Native):
            self._decoder.head = head.weights
            self._held.append(head)

    def _address(self, weight: Floats) -> int:
        kept = np.ascontiguousarray(weight, np.float32)
        self._held.append(kept)
        return kept.ctypes.data

    @staticmethod
    def why_torch(shape: Shape, layers: Sequence[Layer]) -> str:
        """Why torch runs the passes, as the end of a sentence; "" if it does not."""
        linears = [getattr(layer, name) for layer in layers for name in _LINEARS]
        if other := next((linear for linear in linears if not isinstance(linear, Native)), None):
            return f"{other.kind} linear layers are not native"
        if shape.head_dim > _WIDEST or shape.heads // shape.kv_heads > _MOST_SHARED:
            return f"native code takes heads of at most {_WIDEST} channels, and at most {_MOST_SHARED} query heads for each key head"
        return ""

    @property
    def has_head(self) -> bool:
        """Whether it can compute logits."""
        return isinstance(self._head, Native)

    def run(
        self, hidden: Floats, spans: Sequence[Span], loras: Sequence[Lora | None], *, first: int, last: int, kept: Sequence[int] = ()
    ) -> Floats | None:
        """Run layers first..last-1.

        Args:
            hidden: [rows, d], contiguous; changed in place.
            spans: One per sequence, whose caches are prepared.
            loras: Each span's adapter.
            first, last: Layers.
            kept: Rows whose logits are wanted; needs `has_head`.

        Returns:
            Logits [len(kept), V], or None if none are wanted.
        """
        places = [self._place(span, lora) for span, lora in zip(spans, loras, strict=True)]
        turns, rings = self._turns(places), self._places(places)
        logits = np.empty((len(kept), self._head.n_out), np.float32) if kept else None
        part = _part(hidden, places, turns, first, last)
        if rings:
            part.place_count = len(rings[0])
            part.places = (ctypes.c_void_p * len(rings))(*(table.ctypes.data for table in rings))
        if logits is not None:
            part.kept_count, part.kept, part.logits = len(kept), (ctypes.c_int64 * len(kept))(*kept), logits.ctypes.data
        self._kernels.run(self._decoder, part, threads())
        return logits

    def draft(self, hidden: Floats, span: Span, lora: Lora | None, draft: DraftStructure, *, last: int) -> None:
        """Run layers 0..last-1 and draft tokens.

        Args:
            hidden: [rows, d], contiguous; changed.
            span: Its cache is in order, and prepared for `draft.most - 1` more tokens than the rows.
            lora: The span's adapter.
            draft: What to draft; holds the result.
            last: Number of layers.
        """
        place, n = self._place(span, lora), span.n + draft.most - 1
        logits = np.empty(self._head.n_out, np.float32)
        part = _part(hidden, [place], [rope.rows(place.length, n) for rope in self._kinds], 0, last)
        part.kept_count, part.kept, part.logits = 1, (ctypes.c_int64 * 1)(span.n - 1), logits.ctypes.data
        self._kernels.draft(self._decoder, part, draft, threads())

    def best(self, logits: Floats, sharpness: float, tokens: Array, chances: Array) -> None:
        """Find the two most likely tokens [n, 2] of logits [n, V], and their chances."""
        self._kernels.best(np.ascontiguousarray(logits), sharpness, tokens, chances)

    def _place(self, span: Span, lora: Lora | None) -> SpanStructure:
        place = span.cache.native_span(span.n)
        if lora is not None:
            place.lora = ctypes.pointer(lora.structure(self._shape))
        if span.forks:
            place.fork_count, place.forks = len(span.forks), (ctypes.c_int64 * len(span.forks))(*span.forks)
        return place

    def _turns(self, places: Sequence[SpanStructure]) -> list[Array]:
        """For each kind of rotary embedding, [rows, 1, D/2] complex64."""
        if len(places) == 1:
            return [rope.rows(places[0].length, places[0].rows) for rope in self._kinds]
        spans = [(place.length, place.rows) for place in places]
        return [rope.rows_of(spans) for rope in self._kinds]

    def _places(self, spans: Sequence[SpanStructure]) -> list[Array]:
        """For each kind of rotary embedding, its rotations at the places of window caches; [] if there is no such cache."""
        count = max((min(span.length + span.rows, span.sinks + span.window) for span in spans if span.ring), default=0)
        return [rope.rows(0, count) for rope in self._kinds] if count else []


def _part(hidden: Floats, places: Sequence[SpanStructure], turns: Sequence[Array], first: int, last: int) -> PassStructure:
    return PassStructure(
        rows=len(hidden), first=first, last=last, hidden=hidden.ctypes.data,
        span_count=len(places), spans=(SpanStructure * len(places))(*places),
        turns_count=len(turns), turns=(ctypes.c_void_p * len(turns))(*(table.ctypes.data for table in turns)),
    )  # fmt: skip


def _kernels(layer: Layer) -> Kernels:
    assert isinstance(layer.qkv, Native)
    return layer.qkv.kernels

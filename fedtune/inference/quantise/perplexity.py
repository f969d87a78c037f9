"""Perplexity on held-out text, defined alike for every model: windows of `window` tokens every `stride`, each token scored once.

A token is scored in the first window that holds it, given all that stands before it there: at least window − stride tokens, but in the
first window. The very first token has nothing before it and is not scored.

Source: the strided evaluation of transformers' documentation ("Perplexity of fixed-length models").
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedtune.errors import DataError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import Engine

__all__ = ["Score", "of_engine", "perplexity", "windows"]

Logits = Callable[[Tensor], Tensor]  # ids [n] of one sequence → logits [n, V]


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood of so many tokens, in nats."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


@torch.inference_mode()
def perplexity(model: Logits, ids: Tensor, *, window: int, stride: int | None = None) -> Score:
    """How well a model foretells a text.

    Args:
        model: Gives a sequence's logits; `of_engine` makes one.
        ids: [n] tokens of the whole text.
        window: Most tokens that the model sees.
        stride: Tokens between the beginnings of two windows; None: half a window.

    Raises:
        DataError: The text is too short, or the windows do not make sense.
    """
    nats = sum(_nats(model(piece), piece, new) for piece, new in windows(ids, window, stride))
    return Score(nats / (ids.numel() - 1), ids.numel() - 1)


def windows(ids: Tensor, window: int, stride: int | None = None) -> Iterator[tuple[Tensor, int]]:
    """The pieces of a text, each with how many of its last tokens are scored in it; raises as `perplexity`."""
    stride = stride or max(window // 2, 1)
    if ids.numel() < 2 or window < 2 or not 0 < stride < window:
        raise DataError(
            f"perplexity needs two tokens and windows that overlap, not {ids.numel()} tokens in windows of {window} every {stride}:"
            " give more held-out text"
        )
    scored = 1
    for begin in range(0, ids.numel(), stride):
        piece = ids[begin : begin + window]
        yield piece, begin + len(piece) - scored
        scored = begin + len(piece)
        if scored == ids.numel():
            return


def of_engine(engine: Engine) -> Logits:
    """All logits of a sequence, after the model's virtual tokens."""

    def logits(ids: Tensor) -> Tensor:
        cache = engine.cache(limit=engine.virtual + len(ids))
        engine.start(cache)
        return engine.decoder.forward(ids, [Span(cache, len(ids), keep=None)])

    return logits


def _nats(logits: Tensor, piece: Tensor, new: int) -> float:
    """Summed over the last `new` tokens of a piece."""
    return float(cross_entropy(logits[-new - 1 : -1].float(), piece[-new:].long(), reduction="sum"))

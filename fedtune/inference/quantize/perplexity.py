"""Perplexity on held-out text, with one definition for all models: windows of `window` tokens every `stride`, each token scored once.

A token is scored in the first window that holds it, given the tokens before it there: at least window − stride, except in the first window.
The very first token is not scored. For requests and answers, each answer is scored after its own request (`answers`).

Source: the strided evaluation of transformers' documentation ("Perplexity of fixed-length models").
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedtune.errors import DataError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.load import Engine
from fedtune.inference.engine.reference.tensors import as_tensor

__all__ = ["Piece", "Score", "answers", "engine_score", "of_engine", "perplexity", "score", "windows"]

_STRETCH, _ROWS = 1 << 19, 128  # logits that are computed at once; tokens per pass
Logits = Callable[[Tensor], Tensor]  # ids [n] of one sequence → logits [n, V]
Piece = tuple[Tensor, int]  # ids [n] that the model sees, and the number of last ones that are scored (< n)


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood of `tokens` tokens, in nats."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def perplexity(model: Logits, ids: Tensor, *, window: int, stride: int | None = None) -> Score:
    """Score a model on a text.

    Args:
        model: Returns a sequence's logits; see `of_engine`.
        ids: [n] tokens of the whole text.
        window: Maximum number of tokens that the model sees.
        stride: Tokens between the starts of two windows; None: half a window.

    Raises:
        DataError: The text is too short, or the windows are invalid.
    """
    return score(model, windows(ids, window, stride))


@torch.inference_mode()
def score(model: Logits, pieces: Iterable[Piece]) -> Score:
    """Score a model on the last tokens of each piece; all tokens have equal weight."""
    nats, tokens = 0.0, 0
    for piece, new in pieces:
        nats, tokens = nats + _nats(model(piece), piece, new), tokens + new
    return Score(nats / tokens, tokens)


def answers(rows: Iterable[tuple[Sequence[int], Sequence[int]]], most: int, window: int) -> list[Piece]:
    """Return pieces of (request, answer) token rows, until `most` tokens are scored; rows longer than the window are skipped."""
    out: list[Piece] = []
    left = most
    for request, answer in rows:
        if left <= 0:
            break
        if request and answer and len(request) + len(answer) <= window:
            out.append((torch.tensor([*request, *answer]), len(answer)))
            left -= len(answer)
    return out


def windows(ids: Tensor, window: int, stride: int | None = None) -> Iterator[Piece]:
    """Yield the pieces of a text, each with the number of last tokens to score; raises like `perplexity`."""
    stride = stride or max(window // 2, 1)
    if ids.numel() < 2 or window < 2 or not 0 < stride < window:
        raise DataError(
            f"perplexity needs at least two tokens and overlapping windows, not {ids.numel()} tokens in windows of {window} every {stride}:"
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
    """Return a function for all logits of a sequence, after the model's virtual tokens."""

    def logits(ids: Tensor) -> Tensor:
        cache = engine.cache(limit=engine.virtual_length + len(ids))
        engine.start(cache)
        return as_tensor(engine.decoder.forward(ids.numpy(), [Span(cache, len(ids), keep=None)]))

    return logits


@torch.inference_mode()
def engine_score(engine: Engine, pieces: Iterable[Piece]) -> Score:
    """`score(of_engine(engine), pieces)` in blocks of tokens and logits; some kinds may round sums differently in blocks."""
    nats, tokens, step = 0.0, 0, max(_STRETCH // engine.shape.vocab, 1)
    for piece, new in pieces:
        cache = engine.cache(limit=engine.virtual_length + len(piece))
        engine.start(cache)
        parts = (engine.decoder.embed(ids.numpy()) for ids in piece.split(_ROWS))
        hidden = np.concatenate([engine.decoder.run(part, [Span(cache, len(part))]) for part in parts])[-new - 1 : -1]
        for at, ids in enumerate(piece[-new:].long().split(step)):
            logits = as_tensor(engine.decoder.logits(hidden[at * step : (at + 1) * step]))
            nats += float(cross_entropy(logits, ids, reduction="sum"))
        tokens += new
    return Score(nats / tokens, tokens)


def _nats(logits: Tensor, piece: Tensor, new: int) -> float:
    """Negative log-likelihood summed over the last `new` tokens of a piece."""
    return float(cross_entropy(logits[-new - 1 : -1].float(), piece[-new:].long(), reduction="sum"))

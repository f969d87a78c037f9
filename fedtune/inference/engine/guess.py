"""Drafts tokens with a decoder: its most likely token, then the most likely one after it, and so on.

With the native pass, one call makes the whole draft: a small model's passes are shorter than what Python does between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.decoder import Decoder
from fedtune.inference.engine.native.structures import DraftStructure

__all__ = ["Guesses", "Guessing", "best_of", "guess"]

_TABLES = (np.float32, np.uint16, np.float16)  # dtypes of embedding tables, in the order of kernels.h


@dataclass(frozen=True, kw_only=True)
class Guessing:
    """How to draft.

    Args:
        most: Tokens to draft, at least 1.
        vocabulary: Only token ids below this are drafted.
        least: Stop once the product of the tokens' chances, each times `trust` but at most 1, is below this.
        trust: Factor from the model's chances to those that `least` is compared with.
        sharpness: Chances are the softmax of the logits times this: 1 / temperature.
        penalty: The repetition penalty.
        seen: [vocabulary] bool: the tokens to penalize; None without a penalty. Drafted tokens are added.
    """

    most: int
    vocabulary: int
    least: float = 0.0
    trust: float = 1.0
    sharpness: float = 1.0
    penalty: float = 1.0
    seen: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Guesses:
    """Drafted tokens.

    Args:
        tokens: [n, 2]: the two most likely tokens at each place, the likelier first.
        chances: [n, 2]: their probabilities in the drafting model.
    """

    tokens: NDArray[np.int64]
    chances: NDArray[np.float32]


def guess(
    decoder: Decoder, ids: Sequence[int], cache: Cache, how: Guessing, *, adapter: str | None = None, layers: int | None = None
) -> Guesses:
    """Draft the tokens after `ids`, which follow those in the cache. The cache takes all of these tokens but the last drafted one.

    Args:
        decoder: The model.
        ids: At least one token.
        cache: Must have room for `len(ids) + how.most - 1` tokens.
        how: The settings.
        adapter: Name of a separate adapter.
        layers: Number of layers to run (early exit).
    """
    made = Guesses(np.empty((how.most, 2), np.int64), np.empty((how.most, 2), np.float32))
    seen = None if how.seen is None else how.seen[: how.vocabulary].copy()
    span = Span(cache, len(ids), adapter=adapter)
    if cache.in_order and (native := decoder.native_step()) and native.has_head:
        draft = DraftStructure(
            embedding=decoder.embedding.ctypes.data, kind=_TABLES.index(decoder.embedding.dtype), embed_scale=decoder.shape.embed_scale,
            vocabulary=how.vocabulary, most=how.most, least=how.least, trust=how.trust, sharpness=how.sharpness, penalty=how.penalty,
            seen=None if seen is None else seen.ctypes.data, tokens=made.tokens.ctypes.data, chances=made.chances.ctypes.data,
        )  # fmt: skip
        cache.prepare(len(ids) + how.most - 1)
        native.draft(decoder.embed(ids), span, decoder.lora_of(span), draft, last=decoder.shape.layers if layers is None else layers)
        cache.advance(len(ids) + draft.made - 1)
        return Guesses(made.tokens[: draft.made], made.chances[: draft.made])
    chance = 1.0
    for n in range(how.most):
        row = decoder.forward(ids, [span], layers=layers)[0, : how.vocabulary]
        if seen is not None:
            row = np.where(seen, np.where(row > 0, row / how.penalty, row * how.penalty), row)
        made.tokens[n], made.chances[n] = two_best(row, how.sharpness)
        chance *= min(float(made.chances[n, 0]) * how.trust, 1.0)
        if n + 1 == how.most or not chance >= how.least:
            return Guesses(made.tokens[: n + 1], made.chances[: n + 1])
        ids, span = [int(made.tokens[n, 0])], Span(cache, 1, adapter=adapter)
        if seen is not None:
            seen[ids] = True
    raise AssertionError("most is at least 1")


def best_of(decoder: Decoder, logits: NDArray[np.float32], sharpness: float) -> Guesses:
    """The two most likely tokens of each row of logits [n, V]."""
    out = Guesses(np.empty((len(logits), 2), np.int64), np.empty((len(logits), 2), np.float32))
    if native := decoder.native_step():
        native.best(logits, sharpness, out.tokens, out.chances)
    else:
        for i, row in enumerate(logits):
            out.tokens[i], out.chances[i] = two_best(row, sharpness)
    return out


def two_best(row: NDArray[np.float32], sharpness: float) -> tuple[list[int], NDArray[np.float32]]:
    """The two most likely tokens of logits (V,), the first of equals, and their probabilities."""
    row = np.where(np.isnan(row), -np.inf, row)
    first = int(row.argmax())
    others = row.copy()
    others[first] = -np.inf
    best = [first, int(others.argmax())]
    with np.errstate(invalid="ignore"):  # no finite logit: the chances are NaN
        weights = np.exp((row - row[first]) * np.float32(sharpness))
        return best, weights[best] / weights.sum()

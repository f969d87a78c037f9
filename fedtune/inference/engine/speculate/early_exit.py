"""Drafts with the model's first layers: after layer E, the final norm and the head give the logits.

The draft uses the model's own cache; keys and values of draft tokens are removed before verification. Checkpoints that were not trained
for early exit draft poorly, and `adapt` then pauses speculation.

Source: Elhoushi et al. 2024, LayerSkip, arXiv:2404.16710; Zhang et al. 2024, Draft & Verify, arXiv:2309.08168.
"""

from collections.abc import Sequence

import numpy as np

from fedtune.errors import ConfigError
from fedtune.inference.engine.caches.base import Span
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Draft, Drafter, Guesser


class EarlyExit(Drafter):
    """Drafts with the first layers.

    Args:
        layers: E, the number of layers; None uses half of the model's.
    """

    name = "early-exit"

    def __init__(self, layers: int | None = None) -> None:
        self._asked = layers

    def begin(self, sampling: Sampling, context: Context) -> None:
        depth = context.engine.shape.layers
        self._layers = max(1, depth // 2) if self._asked is None else self._asked
        if not 0 < self._layers < depth:
            raise ConfigError(f"an early exit after layer {self._layers} of {depth} saves nothing: leave before the last one")
        self._context = context
        self._guesser = Guesser(sampling, context.engine.shape.vocab)

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None, position: int) -> Draft:
        cache, decoder = self._context.cache, self._context.engine.decoder
        span = Span(cache, 1, adapter=self._context.adapter)
        begun = cache.length

        def step(token: int | None) -> np.ndarray:
            return decoder.forward([ids[-1] if token is None else token], [span], layers=self._layers)

        try:
            return self._guesser.write(step, count, seen, position)
        finally:
            cache.crop(begun)

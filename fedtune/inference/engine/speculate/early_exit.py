"""Drafts with the model's first layers: after layer E, the final norm and the head give the logits.

The draft uses the model's own cache; keys and values of draft tokens are removed before verification. Checkpoints that were not trained
for early exit draft poorly, and `adapt` then pauses speculation.

Source: Elhoushi et al. 2024, LayerSkip, arXiv:2404.16710; Zhang et al. 2024, Draft & Verify, arXiv:2309.08168.
"""

from collections.abc import Sequence

import numpy as np

from fedtune.errors import ConfigError
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.guess import guess
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Draft, Drafter, Least, chosen, guessing


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
        self._sampling = sampling

    def gives_chances(self, grade: int) -> bool:
        return True

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        context = self._context
        cache, decoder = context.cache, context.engine.decoder
        begun = cache.length
        how = guessing(self._sampling, context.engine.shape.vocab, count, seen, least)
        try:
            made = guess(decoder, ids[len(context.ids) :], cache, how, adapter=context.adapter, layers=self._layers)
            return chosen(made, least)
        finally:
            cache.crop(begun)

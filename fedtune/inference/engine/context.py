"""A KV cache with the tokens that it holds, so that a shared prefix is not computed again."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.caches.prefix import common
from fedtune.inference.engine.guess import Guesses, Guessing, guess

if TYPE_CHECKING:
    from fedtune.inference.engine.load import Engine

CHUNK = 512  # tokens per forward pass: longer prompts run in several, which bounds the memory of hidden states and masks


class Context:
    """The state of one sequence.

    Args:
        engine: The model's engine.
        make: Creates an empty cache; called again when a cache cannot be cropped far enough.
        adapter: Name of a separate adapter; None is the model itself.

    Attributes:
        cache: Holds the virtual tokens, then `ids`.
        ids: Tokens in the cache.
    """

    def __init__(self, engine: "Engine", make: Callable[[], Cache] | None = None, *, adapter: str | None = None) -> None:
        self.engine = engine
        self.adapter = adapter
        self._make = make or engine.cache
        self._begin()

    def _begin(self) -> None:
        self.cache = self._make()
        self.engine.start(self.cache)
        self.virtual = self.cache.length
        self.ids: list[int] = []

    @property
    def remaining(self) -> int:
        """Number of tokens that still fit."""
        return self.cache.limit - self.cache.length

    def rewind(self, ids: Sequence[int]) -> int:
        """Keep the longest common prefix with `ids`, but at most all but the last of them. Returns its length."""
        kept = common(self.ids, ids[:-1])
        if not self.crop(kept):
            self._begin()
            kept = 0
        return kept

    def crop(self, length: int) -> bool:
        """Keep the first `length` tokens. Returns False, without a change, if the cache cannot be cropped that far."""
        if length != len(self.ids):
            if not self.cache.can_crop_to(self.virtual + length):
                return False
            self.cache.crop(self.virtual + length)
            del self.ids[length:]
        return True

    @property
    def takes_forks(self) -> bool:
        """Whether `run` takes forks."""
        return self.cache.in_order and self.engine.decoder.native_step() is not None

    def guess(self, tokens: Sequence[int], how: Guessing) -> Guesses:
        """Append one or more tokens and draft those after them (see `guess`). Appends the drafted tokens except the last, too."""
        try:
            made = guess(self.engine.decoder, tokens, self.cache, how, adapter=self.adapter)
            self.ids += [*tokens, *made.tokens[:-1, 0].tolist()]
            return made
        finally:  # after an error, the cache holds no more than the ids
            if self.cache.length > self.virtual + len(self.ids):
                self.cache.crop(self.virtual + len(self.ids))

    def run(self, tokens: Sequence[int], keep: int = 1, forks: Sequence[int] = ()) -> np.ndarray:
        """Append one or more tokens. Returns the logits of the last `keep` of them, (keep, V) float32.

        The last tokens are `forks` of the others (see `Span`); `crop` must remove them before the next pass.
        """
        for at in range(0, len(tokens), CHUNK):
            last = at + CHUNK >= len(tokens)
            part = list(tokens[at : at + CHUNK])
            if not last and at + CHUNK > len(tokens) - keep:
                raise ValueError(f"keep={keep} exceeds the rows of the last pass")
            span = Span(self.cache, len(part), keep=keep if last else 0, adapter=self.adapter, forks=forks)
            logits = self.engine.decoder.forward(part, [span])
            self.ids.extend(part)
        return logits

"""Token recycling: drafts the token that the model last found most likely after the same two tokens, or after the same one. Needs no second
model.

Each pass gives the most likely next tokens at all of its places, also after rejected draft tokens. A table keeps the best two of them by
the two tokens before, and by the one before. On greedy texts of two small story models, the model's choice was the best of the table for
63 and 50 % of all tokens, and the second for 6 and 10 %; on texts sampled at temperature 0.8, for 24 and 32 %, and for 6 and 12 %.

Source: Luo et al. 2024, Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling,
arXiv:2408.08696; here with two tokens beside one as keys, and with a chance for each draft token.
"""

from collections.abc import Sequence

import numpy as np

from fedtune.inference.engine.context import Context
from fedtune.inference.engine.guess import Guesses
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Draft, Drafter, Least, chosen

_MOST = 1 << 17  # keys of a full table, which is then emptied
_PRIOR, _DECAY = 4.0, 0.99  # calibration of the chances: weight of the prior factor 1, in tokens; decay of its statistics per place
_Best = tuple[int, int, float, float]


class Recycle(Drafter):
    """Drafts from the model's earlier choices.

    A draft token's chance is the probability that the model gave it when it was stored, times a calibration: the recent sum of the
    probabilities that such tokens got when they were met again, over the sum of their stored ones.
    """

    name = "recycle"
    learns = True

    def __init__(self) -> None:
        self._table: dict[tuple[int, ...], _Best] = {}
        self._kept, self._promised = [_PRIOR, _PRIOR], [_PRIOR, _PRIOR]  # by length of the key, less one

    def begin(self, sampling: Sampling, context: Context) -> None:
        pass

    def gives_chances(self, grade: int) -> bool:
        return True

    def grade(self, ids: Sequence[int]) -> int | None:
        return 0 if self._find(ids) else None

    def _find(self, ids: Sequence[int]) -> tuple[int, _Best] | None:
        for size in (2, 1):
            if len(ids) >= size and (best := self._table.get(tuple(ids[-size:]))):
                return size, best
        return None

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        text, tokens, chances = list(ids[-2:]), list[tuple[int, int]](), list[tuple[float, float]]()
        before = 1.0
        limit = least or Least()
        while len(tokens) < count and (found := self._find(text)) and before >= limit.draft:
            size, (first, second, one, two) = found
            trust = min(self._kept[size - 1] / self._promised[size - 1], 1 / max(one, 1e-9))
            tokens.append((first, second))
            chances.append((one * trust, two * trust))
            text.append(first)
            before *= min(one * trust * limit.trust, 1.0)
        return chosen(Guesses(np.array(tokens), np.array(chances, np.float32)), least) if tokens else Draft([])

    def learn(self, keys: Sequence[tuple[int, ...]], best: Guesses) -> None:
        if len(self._table) > _MOST:
            self._table.clear()
        for key, tokens, chances in zip(keys, best.tokens.tolist(), best.chances.tolist(), strict=True):
            if not chances[0] > 0:
                continue
            if found := self._find(key):
                size, (first, _, one, _) = found
                at = size - 1
                self._kept[at] = self._kept[at] * _DECAY + (chances[tokens.index(first)] if first in tokens else 0.0)
                self._promised[at] = self._promised[at] * _DECAY + one
            known = (*tokens, *chances)
            self._table[key] = self._table[key[-1:]] = known

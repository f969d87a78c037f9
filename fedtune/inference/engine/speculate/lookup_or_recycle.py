"""Drafts without a second model: by lookup if a long ending of the text occurred before, else by token recycling."""

from collections.abc import Sequence

import numpy as np

from fedtune.inference.engine.context import Context
from fedtune.inference.engine.guess import Guesses
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Draft, Drafter, Least
from fedtune.inference.engine.speculate.lookup import Lookup
from fedtune.inference.engine.speculate.recycle import Recycle

_LONG = 5  # tokens of the shortest ending whose lookup was right more often than the table of `Recycle`


class LookupOrRecycle(Drafter):
    """The drafter of `--speculate auto`. A grade of at least `_LONG` is the lookup's; 0 is token recycling's."""

    name = "auto"
    learns = True

    def __init__(self) -> None:
        self._lookup, self._recycle = Lookup(), Recycle()

    def begin(self, sampling: Sampling, context: Context) -> None:
        self._lookup.begin(sampling, context)

    def gives_chances(self, grade: int) -> bool:
        return grade < _LONG

    def grade(self, ids: Sequence[int]) -> int | None:
        found = self._lookup.grade(ids) or 0
        return found if found >= _LONG else self._recycle.grade(ids)

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        chooses = self._recycle if (self._lookup.grade(ids) or 0) < _LONG else self._lookup
        return chooses.draft(ids, count, seen, least)

    def learn(self, keys: Sequence[tuple[int, ...]], best: Guesses) -> None:
        self._recycle.learn(keys, best)

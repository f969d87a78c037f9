"""Drafters whose tokens are random, none, or known to be right or wrong."""

import random
from collections.abc import Sequence

import numpy as np

from fedtune.inference.engine.context import Context
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Draft, Drafter, Least
from tests.inference.engine.tiny import VOCAB


class Scribble(Drafter):
    """Drafts random tokens, and for each a random alternative (fork)."""

    name = "random"

    def __init__(self) -> None:
        self._random = random.Random(3)

    def begin(self, sampling: Sampling, context: Context) -> None:
        pass

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        tokens, others = (self._random.choices(range(VOCAB), k=count) for _ in range(2))
        return Draft(tokens, list(enumerate(others)))


class Silent(Scribble):
    """Never finds a token worth its cost."""

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        return Draft([])


class Oracle(Drafter):
    """Drafts the correct answer, except for every fifth token."""

    name = "oracle"

    def __init__(self, answer: list[int], prompt: int) -> None:
        self._answer, self._prompt = answer, prompt

    def begin(self, sampling: Sampling, context: Context) -> None:
        pass

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        rest = self._answer[len(ids) - self._prompt :][:count]
        tokens = [(t + (len(ids) + i) % 5 // 4) % VOCAB for i, t in enumerate(rest)]
        return Draft(tokens)


class ThirdIsWrong(Oracle):
    """Drafts the correct answer, except for the third token. With `others` each place has the correct token as a fork."""

    others = False

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        rest = self._answer[len(ids) - self._prompt :][:count]
        return Draft([(t + (i == 2)) % VOCAB for i, t in enumerate(rest)], list(enumerate(rest)) if self.others else [])

"""Speculative decoding: drafts tokens cheaply, verifies them in one pass, and keeps those that the model would have generated.

A drafter proposes tokens (`lookup`, `recycle`, `lookup_or_recycle`, `draft`, `early_exit`), and `adapt` chooses how many; `batch` does both
for the server. The pass that verifies a draft gives the model's next token at each place, drawn with the random number of that position.
Draft tokens are accepted up to the first that differs from it. So the text is that of plain decoding with the same seed, token for token,
whatever is drafted. A draft may also name a second token for a place, a fork (a tree of depth one beside the chain). If the fork is right,
the pass gives the token after it as well.

Source: Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192, with deterministic drafts; Miao
et al. 2024, SpecInfer, arXiv:2305.09781, for trees.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedtune.inference.engine.context import Context
from fedtune.inference.engine.guess import Guesses, Guessing
from fedtune.inference.engine.sample import Sampling


@dataclass(frozen=True)
class Draft:
    """Draft tokens.

    Args:
        tokens: g token ids.
        others: Forks, (k, token) at most once for each k: another token for the place of tokens[k].
        chances: The drafter's probability that each token is right if those before it are; empty if it has none.
        only_read: There are no tokens, because the drafter had to read the text first.
    """

    tokens: list[int]
    others: list[tuple[int, int]] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    only_read: bool = False


@dataclass(frozen=True)
class Least:
    """The lowest probabilities at which a token is worth its cost.

    Args:
        draft: Draft one more token if the product of the probabilities so far is at least this.
        verify: Verify a token if the product of its probability and those before it is at least this.
        trust: Factor from a drafter's chances to probabilities.
    """

    draft: float = 0.0
    verify: float = 0.0
    trust: float = 1.0


class Drafter(ABC):
    """Proposes continuations of a text."""

    name: str
    learns = False  # whether to call `learn` after each pass

    @abstractmethod
    def begin(self, sampling: Sampling, context: Context) -> None:
        """Start a new answer.

        Args:
            sampling: Sampling settings of the answer.
            context: The model's context; at each draft it holds the whole text except the last token.
        """

    def grade(self, ids: Sequence[int]) -> int | None:
        """The confidence of a draft for this text, higher is better; None if there is no draft. Must be cheap."""
        return 0

    def gives_chances(self, grade: int) -> bool:
        """Whether drafts of this grade have chances."""
        return False

    def learn(self, keys: Sequence[tuple[int, ...]], best: Guesses) -> None:
        """Learn from a pass.

        Args:
            keys: For each place of the pass, the last two tokens before it; one if there is only one.
            best: The model's two most likely tokens at each place.
        """
        raise NotImplementedError

    @abstractmethod
    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        """Propose at most `count` next tokens.

        Args:
            ids: The prompt and the answer so far.
            count: At least 1.
            seen: (V,) bool, for the repetition penalty.
            least: Draft only tokens that are worth their cost; None: `count` tokens if possible, and no forks.
        """


def guessing(sampling: Sampling, vocabulary: int, count: int, seen: np.ndarray | None, least: Least | None) -> Guessing:
    """The settings of a model that drafts (see `Drafter.draft`) from this vocabulary."""
    least = least or Least()
    return Guessing(
        most=count, vocabulary=vocabulary, least=least.draft, trust=least.trust, sharpness=sampling.sharpness,
        penalty=sampling.repetition_penalty, seen=seen,
    )  # fmt: skip


def chosen(made: Guesses, least: Least | None) -> Draft:
    """The part of the guesses that is worth verifying; None keeps all of the likeliest tokens."""
    tokens, chances = made.tokens[:, 0].tolist(), made.chances[:, 0].tolist()
    if least is None:
        return Draft(tokens, chances=chances)
    before, others = 1.0, list[tuple[int, int]]()
    for k, chance in enumerate(chances):
        chance = min(chance * least.trust, 1.0)
        if not before * chance >= least.verify:
            return Draft(tokens[:k], [other for other in others if other[0] < k], chances[:k])
        if before * min(float(made.chances[k, 1]), 1 - chance) >= least.verify:
            others.append((k, int(made.tokens[k, 1])))
        before *= chance
    return Draft(tokens, others, chances)

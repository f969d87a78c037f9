"""Speculative decoding: drafts tokens cheaply, verifies them in one pass, and keeps those that the model would have generated.

A drafter proposes tokens (`lookup`, `draft`, `early_exit`), `verify` accepts them so that the model's distribution is preserved, and
`adapt` chooses the number of draft tokens.

Source: Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.inference.engine.context import Context
from fedtune.inference.engine.sample import Sampling, Uniforms, draw, probabilities, scores


@dataclass(frozen=True)
class Draft:
    """Draft tokens.

    Args:
        tokens: g token ids.
        q: (g, V): the distribution of each token; None if the drafter has none, or the answer is greedy.
    """

    tokens: list[int]
    q: np.ndarray | None = None


class Drafter(ABC):
    """Proposes continuations of a text."""

    name: str

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

    @abstractmethod
    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None, position: int) -> Draft:
        """Propose at most `count` next tokens.

        Args:
            ids: The prompt and the answer so far.
            count: At least 1.
            seen: (V,) bool, for the repetition penalty.
            position: Position of the next token in the answer, for the random draws.
        """


class Guesser:
    """Generates a draft token by token with a cheaper model, and the sampling settings of the answer.

    Args:
        sampling: Sampling settings of the answer.
        vocabulary: V of the target model; the cheaper model's logits are cut or padded to it.
    """

    def __init__(self, sampling: Sampling, vocabulary: int) -> None:
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._uniforms = Uniforms(sampling.seed, "draft")

    def write(self, step: Callable[[int | None], np.ndarray], count: int, seen: np.ndarray | None, position: int) -> Draft:
        """Generate a draft; `step` maps the previous token (None at first) to the next logits (1, V')."""
        tokens: list[int] = []
        rows: list[np.ndarray] = []
        seen = None if seen is None else seen.copy()
        for i in range(count):
            logits = step(tokens[-1] if tokens else None)[:, : self._vocabulary]
            if (missing := self._vocabulary - logits.shape[1]) > 0:
                logits = np.pad(logits, ((0, 0), (0, missing)), constant_values=-np.inf)
            if self._sampling.greedy:
                token = int(scores(logits, self._sampling, seen).argmax())
            else:
                rows.append(probabilities(logits, self._sampling, seen))
                token = int(draw(rows[-1], self._uniforms(position + i, 1))[0])
            tokens.append(token)
            if seen is not None:
                seen[token] = True
        return Draft(tokens, np.concatenate(rows) if rows else None)

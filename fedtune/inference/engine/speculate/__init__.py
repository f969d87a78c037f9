"""Guess the next tokens cheaply, check them in one pass, keep those that the model would have written itself.

A drafter guesses (`lookup`, `draft`, `early_exit`), `verify` keeps what preserves the model's distribution, `adapt` decides how many
guesses pay.

Source: Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.inference.engine.context import Context
from fedtune.inference.engine.sample import Sampling, Uniforms, draw, probabilities, scores


@dataclass(frozen=True)
class Draft:
    """Guessed tokens.

    Args:
        tokens: g of them.
        q: (g, V): what each was drawn from; None where each is a guess without a distribution, or the answer is greedy.
    """

    tokens: list[int]
    q: Tensor | None = None


class Drafter(ABC):
    """Guesses how a text goes on."""

    name: str

    @abstractmethod
    def begin(self, sampling: Sampling, context: Context) -> None:
        """A new answer begins, drawn in this way.

        Args:
            sampling: Of the answer.
            context: The model's; at each draft it holds all of the text but the last token.
        """

    def grade(self, ids: Sequence[int]) -> int | None:
        """How sure a draft for this text would be, the higher the surer, or None: there is nothing to guess. Costs next to nothing."""
        return 0

    @abstractmethod
    def draft(self, ids: Sequence[int], count: int, seen: Tensor | None, position: int) -> Draft:
        """At most `count` tokens that may follow.

        Args:
            ids: The prompt and the answer so far.
            count: At least 1.
            seen: (V,) bool, for the repetition penalty.
            position: Of the next token in the answer, for the draws.
        """


class Guesser:
    """Writes a draft token by token by some cheaper model, with the processors of the answer itself.

    Args:
        sampling: Of the answer.
        vocabulary: V of the model that the draft is for; the cheaper model's logits are cut or filled up to it.
    """

    def __init__(self, sampling: Sampling, vocabulary: int) -> None:
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._uniforms = Uniforms(sampling.seed, "draft")

    def write(self, step: Callable[[int | None], Tensor], count: int, seen: Tensor | None, position: int) -> Draft:
        """`step` takes the token before (None at first) and gives the logits (1, V') of the next."""
        tokens: list[int] = []
        rows: list[Tensor] = []
        seen = None if seen is None else seen.clone()
        for i in range(count):
            logits = step(tokens[-1] if tokens else None)[:, : self._vocabulary]
            if (missing := self._vocabulary - logits.shape[1]) > 0:
                logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
            if self._sampling.greedy:
                token = int(scores(logits, self._sampling, seen).argmax(-1))
            else:
                rows.append(probabilities(logits, self._sampling, seen))
                token = int(draw(rows[-1], self._uniforms(position + i, 1)))
            tokens.append(token)
            if seen is not None:
                seen[token] = True
        return Draft(tokens, torch.cat(rows) if rows else None)

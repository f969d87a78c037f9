"""Drafts with a smaller model that has the same tokenizer.

Source: Leviathan et al. 2023, arXiv:2211.17192; `fedtune draft` distills such a model from a larger one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedtune.errors import ModelError
from fedtune.inference.engine.context import Context
from fedtune.inference.engine.sample import Sampling
from fedtune.inference.engine.speculate import Draft, Drafter, Least, chosen, guessing

if TYPE_CHECKING:
    from fedtune.inference.engine.load import Engine


_BEHIND = 32  # most unread tokens before a draft; more, as at the start, are read separately and not counted as drafting cost


class DraftModel(Drafter):
    """Drafts with its own cache, which is cropped after rejections. A long text is read first, in a call that returns no draft.

    Args:
        engine: The draft model.
        target: The target model.

    Raises:
        ModelError: Their tokenizers differ.
    """

    name = "draft"

    def __init__(self, engine: "Engine", target: "Engine") -> None:
        if not engine.text.same_as(target.text):
            raise ModelError(
                f"{engine.folder} cannot draft for {target.folder}: their tokenizers differ; distill a draft model with `fedtune draft`"
            )
        self._own = Context(engine)
        self._vocabulary = min(engine.shape.vocab, target.shape.vocab)

    def begin(self, sampling: Sampling, context: Context) -> None:
        self._sampling = sampling

    def gives_chances(self, grade: int) -> bool:
        return True

    def draft(self, ids: Sequence[int], count: int, seen: np.ndarray | None = None, least: Least | None = None) -> Draft:
        own = self._own
        own.rewind(ids)
        missing = list(ids[len(own.ids) :])
        if max(missing) >= own.engine.shape.vocab:
            return Draft([])  # a token that only the target model has
        if len(missing) > _BEHIND and len(missing) <= own.remaining:
            own.run(missing)
            return Draft([], only_read=True)
        count = min(count, own.remaining - len(missing) + 1)  # the last draft token is not run
        if count < 1:
            return Draft([])
        return chosen(own.guess(missing, guessing(self._sampling, self._vocabulary, count, seen, least)), least)

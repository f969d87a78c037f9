"""Chooses the draft tokens of a batch: how many each sequence gets in the next pass, by lookup in its own text.

A pass of n rows costs c(n), as measured. The k-th draft token of a sequence with acceptance a gives a^k tokens on average. Draft tokens are
added, those that give most first, up to the number of rows with the most tokens per second.

Source: Leviathan et al. 2023, arXiv:2211.17192, section 3.5, for one sequence with a constant c.
"""

from collections.abc import Sequence

from fedtune.inference.engine.speculate.adapt import WORTH, Acceptance, Costs
from fedtune.inference.engine.speculate.lookup import Lookup

__all__ = ["BatchAdapt", "SequenceDrafts"]

_MOST = 8  # draft tokens of a sequence
_ROWS = 64  # rows of a pass with draft tokens
_GROW = 2  # a pass has at most this many times the rows of the largest measured one: beyond it, costs are unknown
_WEIGHT = 2.0  # of the acceptance in all sequences, in draft tokens of one sequence
_DECAY = 0.98  # of the acceptance in all sequences, per verification
_FORGET, _FORGET_ALL = 0.995, 0.9998  # decay of the acceptance in one and in all sequences, per pass without a draft: it is tried again


class SequenceDrafts:
    """The drafts of one sequence: those of `Lookup`, and their acceptance by length of the match.

    Args:
        of_all: The acceptance in all sequences, by length of the match; a new sequence begins with it.
    """

    def __init__(self, of_all: dict[int, Acceptance]) -> None:
        self._lookup, self._seen, self._of_all = Lookup(), dict[int, Acceptance](), of_all
        self._grade: int | None = None

    def acceptance(self, ids: Sequence[int]) -> float:
        """Acceptance of the draft tokens that would follow these tokens; 0 if there are none."""
        self._grade = self._lookup.grade(ids)
        if self._grade is None:
            return 0.0
        own, of_all = self._known(self._grade)
        return own.share(of_all.share(), _WEIGHT)

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` draft tokens after the same tokens."""
        return self._lookup.draft(ids, count).tokens

    def saw(self, guesses: int, kept: int) -> None:
        """Record that a pass verified this many draft tokens, and accepted this many."""
        if self._grade is not None:
            for known, forget in zip(self._known(self._grade), (_FORGET, _FORGET_ALL), strict=True):
                known.saw(guesses, kept) if guesses else known.fade(forget)

    def _known(self, grade: int) -> tuple[Acceptance, Acceptance]:
        return self._seen.setdefault(grade, Acceptance()), self._of_all.setdefault(grade, Acceptance(_DECAY))


class BatchAdapt:
    """Chooses the numbers of draft tokens before each pass, from the durations of earlier ones.

    Attributes:
        acceptance: Of all sequences, by length of the match; for `SequenceDrafts`.
    """

    def __init__(self) -> None:
        self._costs, self.acceptance = Costs(), dict[int, Acceptance]()

    def ran(self, rows: int, seconds: float) -> None:
        """Record the duration of a pass in which every row is a decoded token or a draft token."""
        if rows <= _ROWS:
            self._costs.add(rows, seconds)

    def counts(self, acceptances: Sequence[float]) -> list[int]:
        """Draft tokens for each decoding sequence, given the acceptance of its drafts."""
        n, out = len(acceptances), [0] * len(acceptances)
        most = min(_ROWS, _GROW * self._costs.largest)
        if not 0 < n < most:  # nothing is measured, or there is no room for a draft token
            return out
        costs = self._costs.table(most)
        if not costs[n]:
            return out
        worth = sorted(((a**k, i) for i, a in enumerate(acceptances) if a for k in range(1, _MOST + 1)), reverse=True)
        tokens, best, chosen = float(n), WORTH * n / costs[n], 0
        for rows, (gain, _) in enumerate(worth[: most - n], 1):
            tokens += gain
            if tokens / costs[n + rows] > best:
                best, chosen = tokens / costs[n + rows], rows
        for _, i in worth[:chosen]:
            out[i] += 1
        return out

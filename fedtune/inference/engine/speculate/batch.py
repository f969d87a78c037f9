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
_FORGET = 0.995  # of the acceptance statistics of a sequence that gets no draft, per pass, so that it is tried again


class SequenceDrafts:
    """The drafts of one sequence: those of `Lookup`, and their acceptance by length of the match."""

    def __init__(self) -> None:
        self._lookup, self._seen = Lookup(), dict[int, Acceptance]()
        self._grade: int | None = None

    def acceptance(self, ids: Sequence[int]) -> float:
        """That of the draft tokens that would follow these tokens; 0 if there are none."""
        self._grade = self._lookup.grade(ids)
        return 0.0 if self._grade is None else self._of(self._grade).share

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` draft tokens after the same tokens."""
        return self._lookup.draft(ids, count, None, 0).tokens

    def saw(self, guesses: int, kept: int) -> None:
        """Record that a pass verified this many draft tokens, and accepted this many."""
        if self._grade is not None:
            own = self._of(self._grade)
            own.saw(guesses, kept) if guesses else own.fade(_FORGET)

    def _of(self, grade: int) -> Acceptance:
        return self._seen.setdefault(grade, Acceptance())


class BatchAdapt:
    """Chooses the numbers of draft tokens before each pass, from the durations of earlier ones."""

    def __init__(self) -> None:
        self._costs = Costs()

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
        worth = sorted(((a**k, i) for i, a in enumerate(acceptances) if a for k in range(1, _MOST + 1)), reverse=True)
        tokens, best, chosen = float(n), WORTH * n / costs[n], 0
        for rows, (gain, _) in enumerate(worth[: most - n], 1):
            tokens += gain
            if tokens / costs[n + rows] > best:
                best, chosen = tokens / costs[n + rows], rows
        for _, i in worth[:chosen]:
            out[i] += 1
        return out

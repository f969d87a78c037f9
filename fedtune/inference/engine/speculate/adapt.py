"""Chooses the number of draft tokens from measured costs; none if speculation would be slower.

With acceptance a, g draft tokens give (1 - a^(g+1)) / (1 - a) tokens on average at a cost of d(g) + c(g + 1), where d(g) is the cost of
drafting and c(n) that of a pass of n tokens. Plain decoding gives 1 token at a cost of c(1).

A drafter that knows its tokens' chances stops earlier: a token that costs s seconds is worth it if its chance exceeds s times the tokens
per second that speculation gives now.

Source: Leviathan et al. 2023, arXiv:2211.17192, section 3.5, with measured c(n) and d(g) instead of c(n) = c(1) and d(g) = g d(1).
"""

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.inference.engine.speculate import Least

_KEEP = 4  # measurements per size; the minimum counts, because noise only adds time
_DECAY = 0.9  # of the acceptance statistics, per verification
_TRIALS = 3  # verifications before an attempt is judged; fewer if at the measured costs not even good drafts pay off
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 1024  # steps until the next attempt
_REFRESH = 32  # verifications until a plain step measures c(1) again
WORTH = 1.05  # expected gain below which speculation pauses: measurements are not exact
_HOPE, _WEIGHT = 0.7, 0.5  # prior acceptance at the start of an attempt, and its weight in draft tokens
_TRUST, _SLOW = 5.0, 0.98  # the weight in draft tokens of the prior trust in chances, which is 1; decay of its statistics per verification
_GROW = 3  # a pass has at most this many times the tokens of the largest measured one: beyond it, costs are unknown


class Costs:
    """Seconds of a pass by number of tokens: the minimum of the last measurements, interpolated for other sizes.

    A pass of more tokens is not faster, so its measurement bounds smaller passes. A size that was measured once gets at most what the line
    through the other sizes gives: otherwise a size that was slow once by chance would never be tried again.
    """

    def __init__(self) -> None:
        self._measured: dict[int, deque[float]] = {}
        self._table: list[float] = []

    def add(self, n: int, seconds: float) -> None:
        times = self._measured.setdefault(n, deque(maxlen=_KEEP))
        before = min(times, default=None)
        times.append(seconds)
        if min(times) != before or len(times) == 2:
            self._table = []

    def known(self, n: int) -> bool:
        return n in self._measured

    @property
    def largest(self) -> int:
        """Tokens of the largest measured pass; 0 if none."""
        return max(self._measured, default=0)

    def table(self, most: int) -> list[float]:
        """Seconds of passes of 0 (nothing), 1, ..., `most` tokens; at least one size must have been measured.

        Linear between measured sizes; beyond the largest, on the line through the last two, or constant if there is only one.
        """
        if len(self._table) <= most:
            points = self._points()
            self._table = [0.0, *(self._interpolated(n, points) for n in range(1, most + 1))]
        return self._table

    def _points(self) -> list[tuple[int, float]]:
        points, least = list[tuple[int, float]](), float("inf")
        for size, times in sorted(self._measured.items(), reverse=True):
            least = min(least, *times)
            points.insert(0, (size, least))
        for i, (size, seconds) in enumerate(points):
            others = points[:i] + points[i + 1 :]
            if len(self._measured[size]) == 1 and i > 0 and len(others) > 1:
                points[i] = size, min(seconds, self._interpolated(size, others))
        return points

    def _interpolated(self, n: int, points: list[tuple[int, float]]) -> float:
        below, above = [p for p in points if p[0] <= n], [p for p in points if p[0] >= n]
        if not below:
            return above[0][1]
        right, high = below[-1]
        if above:
            beyond, higher = above[0]
            return high + (higher - high) * (n - right) / max(beyond - right, 1)
        left, low = below[-2] if len(below) > 1 else (right - 1, high)
        return high + max(high - low, 0.0) * (n - right) / (right - left)


@dataclass(frozen=True)
class Verified:
    """A pass that verified draft tokens.

    Args:
        guesses, kept: Draft tokens without forks, and how many of them were accepted.
        rows: Tokens of the pass.
        tokens: Tokens of the answer that it gave.
        chances: The drafter's probability of each draft token; empty if it has none.
    """

    guesses: int
    kept: int
    rows: int
    tokens: int
    chances: Sequence[float] = ()


class Adapt:
    """Chooses the number of draft tokens before each step.

    A drafter may report its confidence as a grade; each grade has its own acceptance and pauses.

    Args:
        most: Maximum number of draft tokens.
        fixed: Always draft this many; None adapts.
    """

    def __init__(self, most: int = 10, fixed: int | None = None) -> None:
        self.most = most
        self.fixed = fixed
        self.costs = Costs()
        self._drafts = Costs()  # seconds by number of draft tokens
        self._drafts.add(0, 0.0)
        self._grades: dict[int, _Grade] = {}
        self._since_plain = 0

    @property
    def most_rows(self) -> int:
        """The most tokens that the next pass may have: the costs of more are unknown."""
        return _GROW * self.costs.largest if self.fixed is None else sys.maxsize

    def acceptance(self, grade: int = 0) -> float:
        """Acceptance of a draft token whose predecessors were accepted."""
        return self._of(grade).acceptance

    def _of(self, grade: int) -> "_Grade":
        return self._grades.setdefault(grade, _Grade())

    def best(self, grade: int = 0, hoped: float = 0.0) -> tuple[float, int]:
        """Return the best expected speedup over plain decoding and its number of draft tokens, for an acceptance of at least `hoped`."""
        acceptance = max(self._of(grade).acceptance, hoped)
        costs, drafts = self.costs.table(self.most + 1), self._drafts.table(self.most)
        tokens, last, found = 1.0, 1.0, (0.0, 1)
        for guesses in range(1, min(self.most, self.most_rows - 1) + 1):
            last *= acceptance
            tokens += last
            time = drafts[guesses] + costs[guesses + 1]
            found = max(found, (tokens * costs[1] / time if time else 1.0, guesses), key=lambda f: f[0])
        return found

    def count(self, grade: int = 0, gives_chances: bool = False) -> int:
        """Number of draft tokens for the next step; 0: decode without speculation. With chances, a maximum: `least` may end the draft."""
        if self.fixed is not None:
            return self.fixed
        state = self._of(grade)
        if state.pause:
            state.pause -= 1
            if not state.pause:
                state.begin()
            return 0
        if not self.costs.known(1) or self._since_plain >= _REFRESH:
            return 0
        gain, guesses = self.best(grade)
        if gives_chances:
            guesses = min(self.most, self.most_rows - 1)
            gain = gain if state.left > 0 else state.rate * self.costs.table(1)[1]
        if state.left == _TRIALS or (state.left > 0 and self.best(grade, _HOPE)[0] > WORTH):
            return guesses
        if gain > WORTH:
            state.interval = 0
            return guesses
        state.interval = min(2 * state.interval, _LONGEST_PAUSE) or _FIRST_PAUSE
        state.pause = state.interval
        return 0

    def least(self, grade: int = 0) -> Least | None:
        """The lowest chances at which tokens are worth their cost; None: draft a fixed number."""
        if self.fixed is not None:
            return None
        state = self._of(grade)
        most, drafted = max(self.costs.largest - 1, 1), max(self._drafts.largest, 2)
        costs, drafts = self.costs.table(most + 1), self._drafts.table(drafted)
        rate = state.rate or self.best(grade)[0] / costs[1] if costs[1] else 0.0
        verifying = (costs[most + 1] - costs[1]) / most * rate
        drafting = (drafts[drafted] - drafts[1]) / (drafted - 1) * rate
        return Least((drafting + verifying) / state.acceptance, verifying, state.trust)

    def plain(self, seconds: float, rows: int = 1) -> None:
        """Record the duration of a step without speculation, a pass of this many tokens."""
        self.costs.add(rows, seconds)
        self._since_plain = 0 if rows == 1 else self._since_plain

    def verified(self, seen: Verified, draft_seconds: float, pass_seconds: float, grade: int = 0) -> None:
        """Record a step with speculation, and the seconds of drafting and of the pass."""
        self.costs.add(seen.rows, pass_seconds)
        self._drafts.add(seen.guesses, draft_seconds)
        self._of(grade).saw(seen, self._seconds(seen.guesses, seen.rows))
        self._since_plain += 1

    def refused(self, seconds: float, grade: int = 0) -> None:
        """Record the seconds of a draft without a token worth verifying; a step without speculation follows."""
        if self.fixed is None:
            self._drafts.add(1, seconds)
            self._of(grade).took(1, self._seconds(1, 1))

    def _seconds(self, guesses: int, rows: int) -> float:
        """Seconds of a step by the measured minima, so without noise."""
        return self._drafts.table(guesses)[guesses] + self.costs.table(rows)[rows]


class Acceptance:
    """The share of draft tokens that are accepted if those before them are, from a prior and recent verifications.

    Args:
        decay: Factor on what was seen, for each new verification.
    """

    def __init__(self, decay: float = _DECAY) -> None:
        self._decay = decay
        self.kept = self.tried = 0.0

    def share(self, prior: float = _HOPE, weight: float = _WEIGHT) -> float:
        """The share; the prior counts as `weight` draft tokens."""
        return (self.kept + prior * weight) / (self.tried + weight)

    def saw(self, guesses: int, kept: int) -> None:
        """Record a verification."""
        self.kept = self.kept * self._decay + kept
        self.tried = self.tried * self._decay + kept + (kept < guesses)

    def fade(self, factor: float) -> None:
        """Move toward the prior."""
        self.kept, self.tried = self.kept * factor, self.tried * factor


class _Grade:
    """Acceptance, tokens per second and pauses of one grade.

    Attributes:
        trust: Accepted draft tokens over the sum of their chances, at places where the tokens before were right.
    """

    def __init__(self) -> None:
        self.pause = self.interval = 0  # remaining steps of the pause; length of the last pause
        self.begin()

    def begin(self) -> None:
        self.of = Acceptance()
        self.left = _TRIALS
        self._tokens = self._seconds = 0.0
        self._promised = self._kept = _TRUST

    @property
    def acceptance(self) -> float:
        return self.of.share()

    @property
    def rate(self) -> float:
        """Tokens per second of the recent steps; 0 if there were none."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def trust(self) -> float:
        return self._kept / self._promised

    def saw(self, seen: Verified, seconds: float) -> None:
        self.of.saw(seen.guesses, seen.kept)
        self.took(seen.tokens, seconds)
        tried = seen.chances[: seen.kept + 1]  # those whose predecessors were right
        if tried:
            self._promised, self._kept = self._promised * _SLOW + sum(tried), self._kept * _SLOW + seen.kept

    def took(self, tokens: int, seconds: float) -> None:
        self.left -= 1
        self._tokens, self._seconds = self._tokens * _DECAY + tokens, self._seconds * _DECAY + seconds

"""How many tokens to guess: as many as pay, by what was measured; none where guessing would slow things down.

With acceptance a, g guesses give (1 - a^(g+1)) / (1 - a) tokens on average, for d(g) + c(g + 1), where d(g) is the cost of making them and
c(n) that of a pass of n tokens. Plain decoding gives 1 for c(1).

Source: Leviathan et al. 2023, arXiv:2211.17192, section 3.5, with measured c(n) and d(g) in place of c(n) = c(1) and d(g) = g d(1).
"""

from collections import deque

_KEEP = 4  # measurements of each kind; the least of them counts, as noise only adds
_DECAY = 0.9  # of the acceptance's memory, a verification
_TRIALS = 3  # verifications before an attempt is judged, fewer where the costs that it finds would not let even good guesses pay
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 1024  # steps until the next attempt
_REFRESH = 32  # verifications after which one plain step measures c(1) again
_WORTH = 1.05  # expected gain below which guessing is switched off: what is measured is not exact
_HOPE, _WEIGHT = 0.7, 0.5  # acceptance taken for granted when an attempt begins, and how many guesses that weighs as much as
_GROW = 3  # a pass takes at most so many times the tokens of the largest that was measured: what lies beyond it is not known to be cheap


class Costs:
    """Seconds of a pass by its tokens: the least of the last measurements, interpolated where there are none.

    A pass of more tokens takes no less, so what was measured bounds the passes of fewer; and a single measurement is not believed to lie
    above the line that the others make: a size that was slow by chance the only time it was tried would be shunned for ever.
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
        """Tokens of the largest pass that was measured; 0 where none was."""
        return max(self._measured, default=0)

    def table(self, most: int) -> list[float]:
        """Seconds of passes of 0 (nothing), 1, ..., `most` tokens; at least one size must have been measured.

        Between two measured sizes on the line through them; beyond the largest on the line through the last two, or level where there is
        only one: an attempt will show.
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


class Adapt:
    """Chooses the number of guesses before each step.

    A drafter may know how sure it is and say it as a grade; each grade has its own acceptance and its own pauses.

    Args:
        most: Never guess more.
        fixed: Always guess this many, whatever is measured; None adapts.
    """

    def __init__(self, most: int = 10, fixed: int | None = None) -> None:
        self.most = most
        self.fixed = fixed
        self.costs = Costs()
        self._drafts = Costs()  # seconds of so many guesses
        self._drafts.add(0, 0.0)
        self._grades: dict[int, _Grade] = {}
        self._since_plain = 0

    def acceptance(self, grade: int = 0) -> float:
        """Of a guess whose predecessors were accepted."""
        return self._of(grade).acceptance

    def _of(self, grade: int) -> "_Grade":
        return self._grades.setdefault(grade, _Grade())

    def best(self, grade: int = 0, hoped: float = 0.0) -> tuple[float, int]:
        """Expected speed over that of plain decoding, and the number of guesses that gives it; with an acceptance of `hoped` at least."""
        acceptance = max(self._of(grade).acceptance, hoped)
        costs, drafts = self.costs.table(self.most + 1), self._drafts.table(self.most)
        tokens, last, found = 1.0, 1.0, (0.0, 1)
        for guesses in range(1, min(self.most, _GROW * self.costs.largest - 1) + 1):
            last *= acceptance
            tokens += last
            time = drafts[guesses] + costs[guesses + 1]
            found = max(found, (tokens * costs[1] / time if time else 1.0, guesses), key=lambda f: f[0])
        return found

    def count(self, grade: int = 0) -> int:
        """Guesses for the next step; 0: decode plainly."""
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
        if state.left == _TRIALS or (state.left > 0 and self.best(grade, _HOPE)[0] > _WORTH):
            return guesses
        if gain > _WORTH:
            state.interval = 0
            return guesses
        state.interval = min(2 * state.interval, _LONGEST_PAUSE) or _FIRST_PAUSE
        state.pause = state.interval
        return 0

    def plain(self, seconds: float) -> None:
        """A step without guesses took this long."""
        self.costs.add(1, seconds)
        self._since_plain = 0

    def verified(self, guesses: int, kept: int, draft_seconds: float, pass_seconds: float, grade: int = 0) -> None:
        """A step with guesses: of so many so many stayed; making them and checking them took this long."""
        self.costs.add(guesses + 1, pass_seconds)
        self._drafts.add(guesses, draft_seconds)
        self._of(grade).saw(guesses, kept)
        self._since_plain += 1


class _Grade:
    """What guesses of one grade came to, and how long they pause."""

    def __init__(self) -> None:
        self.pause = self.interval = 0  # steps left without guesses; length of the last such pause
        self.begin()

    def begin(self) -> None:
        self.kept = self.tried = 0.0
        self.left = _TRIALS

    @property
    def acceptance(self) -> float:
        return (self.kept + _HOPE * _WEIGHT) / (self.tried + _WEIGHT)

    def saw(self, guesses: int, kept: int) -> None:
        self.kept = self.kept * _DECAY + kept
        self.tried = self.tried * _DECAY + kept + (kept < guesses)
        self.left -= 1

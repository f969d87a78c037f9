"""The mean score of the worst decile."""

import pytest

from fedtune.contracts.scores import worst_decile


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(1, 0.0, 0.0), (9, 0.0, 8.0), (10, 0.0, 9.0), (11, 0.5, 9.5), (20, 0.5, 18.5), (21, 1.0, 19.0)],
)
def test_the_worst_decile_is_the_mean_of_a_tenth_rounded_up(count: int, low: float, high: float) -> None:
    scores = [float(v) for v in range(count)]  # by hand: 11 scores have ⌈11/10⌉ = 2 worst, (0 + 1) / 2 = 0.5 and (10 + 9) / 2 = 9.5
    assert worst_decile(scores, higher_is_better=True) == low
    assert worst_decile(scores, higher_is_better=False) == high


def test_the_worst_decile_of_no_scores_is_none() -> None:
    assert worst_decile([], higher_is_better=True) is None

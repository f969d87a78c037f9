"""Forgetting, by hand."""

import pytest

from fedtune.contracts.task import higher_is_better
from fedtune.warm_start.earlier import forgetting


@pytest.mark.parametrize(
    ("values", "higher", "lost"),
    [
        ([0.9], True, [0.0]),
        ([0.9, 0.7], True, [0.0, 0.2]),
        ([0.9, 0.95, 0.7, 0.8], True, [0.0, 0.0, 0.25, 0.15]),  # the best value came after the start
        ([4.0, 3.5, 5.0], False, [0.0, 0.0, 1.5]),  # perplexity: lower is better
    ],
)
def test_forgetting_is_the_best_value_less_the_current_one(values: list[float], higher: bool, lost: list[float]) -> None:
    found = [forgetting(values[: i + 1], higher_is_better=higher) for i in range(len(values))]
    assert found == pytest.approx(lost)


def test_the_new_numbers_have_a_direction() -> None:
    """`fedtune compare --metric NAME` says which of them are better."""
    directions = {name: higher_is_better(name) for name in ("earlier_exact_match", "earlier_perplexity", "earlier_loss", "forgetting")}
    assert directions == {"earlier_exact_match": True, "earlier_perplexity": False, "earlier_loss": False, "forgetting": False}

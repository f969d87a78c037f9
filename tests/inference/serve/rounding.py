"""An answer in a batch may differ from the answer to a single request only at choices that rounding can decide."""

from collections.abc import Sequence

import numpy as np

from fedtune.inference.engine.context import Context
from fedtune.inference.engine.generate import _rounding
from fedtune.inference.engine.load import Engine


def first_difference(one: Sequence[object], other: Sequence[object]) -> int | None:
    """The first position at which two sequences differ; None if one is a prefix of the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def lead(engine: Engine, prompt: Sequence[int], answer: Sequence[int], at: int, other: int | None = None) -> float:
    """The difference between the scores of a greedy answer's token number `at` and of another token, as a fraction of the largest score.

    Computed in a single request. `other` is the other token; None: the second best.
    """
    context = Context(engine)
    row = context.run(prompt)[0]
    for token in answer[:at]:
        row = context.run([token])[0]
    second, best = np.sort(row)[-2:]
    assert row[answer[at]] == best, "the answer is not the greedy one"
    return float((best - (second if other is None else row[other])) / np.abs(row).max())


def bound(engine: Engine) -> float:
    """The lead up to which `Report.close` counts a choice as one that rounding could have decided; 0 in float32."""
    return _rounding(engine.decoder)

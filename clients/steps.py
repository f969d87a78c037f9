"""How a plan paces a client: how many steps, which rows in each, at which learning rate."""

import math
import random
from collections.abc import Iterator

from fedtune.contracts.plan import Plan


def steps_of(plan: Plan, examples: int) -> int:
    """Optimizer steps that the plan asks of a client with so many rows."""
    steps = plan.steps if plan.steps is not None else math.ceil(examples * (plan.epochs or 0) / (plan.batch_size * plan.accumulate))
    return max(1, steps)


def batches(examples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers: each pass a new permutation, its last batch as short as it comes."""
    rng = random.Random(seed)
    while True:
        order = list(range(examples))
        rng.shuffle(order)
        yield from (order[i : i + batch_size] for i in range(0, examples, batch_size))


def lr_at(plan: Plan, step: int, steps: int) -> float:
    """Learning rate of a step, from 0."""
    return plan.lr + (plan.lr_last - plan.lr) * step / steps

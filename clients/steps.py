"""A plan's steps on one client: their number, and the rows and learning rate of each."""

import math
import random
from collections.abc import Iterator, Sequence

import torch

from fedtune.contracts.plan import Plan


def steps_of(plan: Plan, examples: int) -> int:
    """Optimizer steps of the plan for a client with `examples` rows."""
    steps = plan.steps if plan.steps is not None else math.ceil(examples * (plan.epochs or 0) / (plan.batch_size * plan.accumulate))
    return max(1, steps)


def batches(examples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Infinite batches of row indices: each pass is a new permutation, and its last batch may be smaller."""
    rng = random.Random(seed)
    while True:
        order = list(range(examples))
        rng.shuffle(order)
        yield from (order[i : i + batch_size] for i in range(0, examples, batch_size))


def lr_at(plan: Plan, step: int, steps: int) -> float:
    """Learning rate of a step; steps count from 0."""
    return plan.lr + (plan.lr_last - plan.lr) * step / steps


def optimizer_of(plan: Plan, params: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The plan's optimizer for these parameters."""
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    # without momentum, SGD's weight decay equals decoupled weight decay
    return torch.optim.SGD(params, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)

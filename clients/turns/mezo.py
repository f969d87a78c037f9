"""MeZO's client half: each step moves along one random direction, by the difference of two losses. It needs no backward pass.

Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes, arXiv:2305.17333, algorithm 1.
"""

from dataclasses import dataclass

import torch
from torch import nn

from fedtune.clients.steps import lr_at, steps_of
from fedtune.clients.turns._base import Turn, Work
from fedtune.config.bounds import require
from fedtune.contracts.directions import move
from fedtune.contracts.plan import matching
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import PlanError


@dataclass(kw_only=True)
class _Count:
    """Steps done."""

    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class MeZO(Turn):
    """w ← w − η·(d·z + weight_decay·w) with d = (L(w + εz) − L(w − εz)) / 2ε and z ~ N(0, I), a new z in each step.

    The plan's optimizer does nothing; its learning rate and weight decay are used here. `clip_norm` bounds |d|. Peak memory is that of a
    forward pass, plus one z of one tensor.

    Args:
        eps: ε.
    """

    eps: float

    @property
    def passes(self) -> float:
        return 2 / 3

    def check(self) -> None:
        require("the turn's eps", self.eps, PlanError, gt=0)

    def begin(self, work: Work) -> _Count:
        return _Count()

    def gradient(self, work: Work, memory: _Count) -> float:
        plan = work.plan
        seed = derive_seed(plan.seed, "mezo", memory.steps)
        lr = lr_at(plan, memory.steps, steps_of(plan, len(work.examples)))
        memory.steps += 1
        with torch.no_grad():
            loss, slope = two_sided(work, seed, self.eps)
            params = trained(work)
            for p in params.values():
                p.mul_(1.0 - lr * plan.weight_decay)
            move(params, seed, -lr * slope)
        return loss


def trained(work: Work) -> dict[str, nn.Parameter]:
    """The live parameters that the plan trains."""
    return {n: work.live.parameters[n] for n in matching(work.live.parameters, work.plan.train)}


def two_sided(work: Work, seed: int, eps: float) -> tuple[float, float]:
    """The mean of both losses, and (L(w + εz) − L(w − εz)) / 2ε, at most `clip_norm` in size. w is the same afterwards, up to rounding."""
    assert work.minibatch is not None
    params = trained(work)
    move(params, seed, eps)
    ahead = work.minibatch.loss()
    move(params, seed, -2 * eps)
    behind = work.minibatch.loss()
    move(params, seed, eps)
    slope, most = (ahead - behind) / (2 * eps), work.plan.clip_norm
    return (ahead + behind) / 2, slope if most is None else max(-most, min(most, slope))

"""FwdLLM's client half: forward gradients, the mean of d·v over random directions v, in place of backpropagation.

Source: Xu et al. 2024, FwdLLM: Efficient Federated Finetuning of Large Language Models with Perturbed Inferences, USENIX ATC 2024,
arXiv:2308.13894; the authors' code: UbiquitousLearning/FwdLLM (its variance and its choice of directions).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns.mezo import trained, two_sided
from fedtune.config.bounds import require
from fedtune.contracts.directions import direction
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import PlanError


@dataclass(kw_only=True)
class _Last:
    """The gradient of the last step, and the number of steps."""

    gradient: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class FwdLLM(Turn):
    """The gradient of a step is the mean of d·v over n directions v ~ N(0, I), with d = (L(w + εv) − L(w − εv)) / 2ε.

    n starts at `perturbations` and doubles up to `most`, until the variance between the means of both halves, averaged over the entries, is
    at most `variance`. Each v is the one of `candidates` draws with the largest |cosine| to the last step's gradient. In the paper, the
    server decides about n for the whole cohort; here, each client does for its own step.

    Args:
        eps: ε.
        perturbations: First n, at least 2.
        most: Largest n.
        variance: The bound.
        candidates: Draws for each direction; 1 takes the first, so that the gradient is unbiased.
    """

    eps: float
    perturbations: int
    most: int
    variance: float
    candidates: int

    @property
    def passes(self) -> float:
        return 2 / 3 * self.most

    def check(self) -> None:
        require("the turn's eps", self.eps, PlanError, gt=0)
        require("the turn's perturbations", self.perturbations, PlanError, ge=2)
        require("the turn's most", self.most, PlanError, ge=self.perturbations)
        require("the turn's variance", self.variance, PlanError, ge=0)
        require("the turn's candidates", self.candidates, PlanError, ge=1)

    def begin(self, work: Work) -> _Last:
        return _Last()

    def gradient(self, work: Work, memory: _Last) -> float:
        params = trained(work)
        sums = [{n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2)]  # both halves
        losses, done, wanted = list[float](), 0, self.perturbations
        with torch.no_grad():
            while done < wanted:
                seed = self._choose(work, memory, done)
                loss, slope = two_sided(work, seed, self.eps)
                for name, total in sums[done % 2].items():
                    total.add_(direction(seed, name, total.shape).to(total.device), alpha=slope)
                losses.append(loss)
                done += 1
                if done == wanted and self._variance(sums, done) > self.variance:
                    wanted = min(2 * wanted, self.most)
        memory.gradient = {n: (sums[0][n] + sums[1][n]) / done for n in params}
        memory.steps += 1
        for name, p in params.items():
            p.grad = memory.gradient[name].clone()
        return sum(losses) / len(losses)

    def _choose(self, work: Work, memory: _Last, number: int) -> int:
        """The seed of the next direction."""
        seeds = [derive_seed(work.plan.seed, "fwdllm", memory.steps, number, i) for i in range(self.candidates)]
        if not memory.gradient or len(seeds) == 1:
            return seeds[0]
        return max(seeds, key=lambda seed: _cosine(memory.gradient, seed))

    @staticmethod
    def _variance(sums: list[dict[str, Tensor]], count: int) -> float:
        """Mean over the entries of the variance of two numbers, the means of both halves."""
        sizes = (count + 1) // 2, count // 2
        squares = sum(float((a / sizes[0] - sums[1][n] / sizes[1]).square().sum()) / 2 for n, a in sums[0].items())
        return squares / sum(a.numel() for a in sums[0].values())


def _cosine(gradient: dict[str, Tensor], seed: int) -> float:
    """|cos| of the gradient and the direction of the seed, up to the gradient's norm."""
    dot, norm = 0.0, 0.0
    for name, g in gradient.items():
        z = direction(seed, name, g.shape).to(g.device)
        dot, norm = dot + float((g * z).sum()), norm + float(z.square().sum())
    return abs(dot) / math.sqrt(norm)

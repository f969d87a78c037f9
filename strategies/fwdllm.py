"""Federated averaging of adapters that clients train with forward gradients.

Source: Xu et al. 2024, FwdLLM: Efficient Federated Finetuning of Large Language Models with Perturbed Inferences, USENIX ATC 2024,
arXiv:2308.13894.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._require import no_privacy
from fedtune.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FwdLLM(FedAvg):
    """w ← sum_k p_k w_k; the clients' optimizer steps along forward gradients. Deviations from the paper: `clients/turns/fwdllm.py`.

    Args:
        eps: ε of the two-sided differences.
        perturbations: Directions of a step, at first.
        most: Directions of a step, at most.
        variance: Directions are doubled until the variance between both halves is at most this.
        candidates: Draws for each direction; the one closest to the last gradient is used.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    eps: float = 1e-2
    perturbations: int = 8
    most: int = 32
    variance: float = 0.05
    candidates: int = 4

    def check(self, config: Config) -> None:
        require("strategy.eps", self.eps, gt=0)
        require("strategy.perturbations", self.perturbations, ge=2)
        require("strategy.most", self.most, ge=self.perturbations)
        require("strategy.variance", self.variance, ge=0)
        require("strategy.candidates", self.candidates, ge=1)
        no_privacy(config, "fwdllm")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        params = {
            "eps": self.eps,
            "perturbations": self.perturbations,
            "most": self.most,
            "variance": self.variance,
            "candidates": self.candidates,
        }
        return {p.client: Assignment(plan=p.with_turn("fwdllm", **params), adapter=state.adapter) for p in plans}

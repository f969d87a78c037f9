"""pFedMe: the shared adapter follows the clients' Moreau envelopes, whose minimizers are the personal adapters.

Source: T. Dinh et al. 2020, Personalized Federated Learning with Moreau Envelopes, arXiv:2006.08848, algorithm 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.errors import ConfigError
from fedtune.strategies._mean import MeanStrategy
from fedtune.strategies._require import no_record_privacy


@dataclass(frozen=True, kw_only=True)
class PFedMe(MeanStrategy):
    """w ← (1 − β)·w + β·sum_k p_k w_k. A client's w_k steps along μ·(w_k − θ̂), with θ̂ ≈ argmin f_k(θ) + μ/2·‖θ − w_k‖².

    θ̂ stays on the client as its personal adapter. Each step of a turn costs `inner_steps` gradients. The paper's rate of w is `client.lr`;
    with AdamW, it sets the size of a step, whatever μ is.

    Args:
        mu: μ (λ in the paper), per unit of squared distance in the parameters.
        inner_steps: Gradient steps of θ for each step of w (K).
        inner_lr: Learning rate of θ's steps.
        beta: β, the server's step.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=False, assumes_zero_init=False
    )
    mu: float = 1.0
    inner_steps: int = 5
    inner_lr: float = 0.1
    beta: float = 1.0

    def check(self, config: Config) -> None:
        no_record_privacy(config, "pfedme")
        require("strategy.mu", self.mu, gt=0)
        require("strategy.inner_steps", self.inner_steps, ge=1)
        require("strategy.inner_lr", self.inner_lr, gt=0)
        require("strategy.beta", self.beta, gt=0)
        if self.inner_lr * self.mu >= 2:
            raise ConfigError(
                f"strategy.inner_lr={self.inner_lr:g} times strategy.mu={self.mu:g} is 2 or more, so the inner steps diverge: lower one of"
                " them"
            )

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        params = {"mu": self.mu, "inner_steps": self.inner_steps, "inner_lr": self.inner_lr}
        return {p.client: Assignment(plan=p.with_turn("pfedme", **params), adapter=state.adapter) for p in plans}

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        old = state.adapter.tensors
        new = {n: (old[n].double() + self.beta * (t.double() - old[n].double())).to(old[n].dtype) for n, t in mean.items()}
        return dataclasses.replace(state, adapter=state.adapter.replace({**old, **new}))

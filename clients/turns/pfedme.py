"""pFedMe's client half: steps along the gradient of the Moreau envelope, whose minimizer is the client's personal adapter.

Source: T. Dinh et al. 2020, Personalized Federated Learning with Moreau Envelopes, arXiv:2006.08848, algorithm 1.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns._beside import gradients_of, put, set_gradients, values_of
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import PlanError


@dataclass(kw_only=True)
class _Last:
    """The personal tensors θ̂ after the last step."""

    theta: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PFedMe(Turn):
    """In each step, θ takes K gradient steps on f(θ) + μ/2·‖θ − w‖² from θ = w, on the step's rows. The gradient of w is then μ·(w − θ̂).

    Args:
        mu: μ (λ in the paper), per unit of squared distance in the parameters.
        inner_steps: K.
        inner_lr: Learning rate of θ's steps; K·inner_lr·μ below 1 keeps them stable.
    """

    private: ClassVar[tuple[str, ...]] = ("user",)  # the personal adapter never leaves the client
    mu: float
    inner_steps: int
    inner_lr: float

    @property
    def passes(self) -> float:
        return float(self.inner_steps)

    def check(self) -> None:
        require("the turn's mu", self.mu, PlanError, gt=0)
        require("the turn's inner_steps", self.inner_steps, PlanError, ge=1)
        require("the turn's inner_lr", self.inner_lr, PlanError, gt=0)

    def begin(self, work: Work) -> _Last:
        return _Last()

    def step(self, work: Work, memory: _Last) -> None:
        assert work.minibatch is not None
        w = values_of(work)
        theta = dict(w)
        for k in range(self.inner_steps):
            if k:  # the step's own gradient is that at θ = w
                put(work, theta)
                work.minibatch.gradient()
            gradient = gradients_of(work)
            with torch.no_grad():
                theta = {n: t - self.inner_lr * (gradient.get(n, 0.0) + self.mu * (t - w[n])) for n, t in theta.items()}
        memory.theta = theta
        put(work, w)
        set_gradients(work, {n: self.mu * (w[n] - theta[n]) for n in w})

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        assert work.keep is not None
        put(work, work.memory.theta)
        work.keep(work.live.read(version=work.plan.base_version))
        return trained

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        return kept or given

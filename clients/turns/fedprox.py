"""FedProx's proximal term: it keeps a client near the tensors that the server sent.

Source: Li et al. 2020, Federated Optimization in Heterogeneous Networks, arXiv:1812.06127, algorithm 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import BatchedTurn, Stack, Turn, Work, add_gradient
from fedtune.config.bounds import require
from fedtune.contracts.plan import matching
from fedtune.errors import PlanError


class BatchedProximalTerm(BatchedTurn):
    """The proximal terms of all clients, each with its own μ."""

    def __init__(self, turns: Sequence["FedProx"], stack: Stack) -> None:
        self._anchor = {n: stack.views[n].detach().clone() for n in stack.trained}
        self._mu = torch.tensor([t.mu for t in turns], device=next(iter(stack.views.values())).device)

    def step(self, stack: Stack) -> None:
        mu = self._mu[list(stack.rows)]
        for name, anchor in self._anchor.items():
            view = stack.views[name]
            column = mu.view(-1, *[1] * (view.dim() - 1))
            add_gradient(view, column * (view.detach() - anchor[list(stack.rows)]))


@dataclass(frozen=True, kw_only=True)
class FedProx(Turn):
    """Adds μ/2·‖w − w_t‖² to the loss, over all trained tensors.

    Args:
        mu: μ, per unit of squared distance in the parameters.
    """

    private: ClassVar[tuple[str, ...]] = ("record", "user")
    batched: ClassVar[type[BatchedTurn] | None] = BatchedProximalTerm
    mu: float

    def check(self) -> None:
        require("the turn's mu", self.mu, PlanError, ge=0)

    def begin(self, work: Work) -> list[tuple[Tensor, Tensor]]:
        names = matching(work.live.parameters, work.plan.train)
        return [(p, p.detach().clone()) for p in (work.live.parameters[n] for n in names)]

    def step(self, work: Work, memory: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():  # the gradient of μ/2·‖w − w_t‖²
            for parameter, anchor in memory:
                add_gradient(parameter, parameter - anchor, self.mu)

"""Ditto's client half: beside the shared adapter, a personal one that stays near it.

Source: Li et al. 2021, Ditto: Fair and Robust Federated Learning Through Personalization, arXiv:2012.04221, algorithm 1.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedtune.clients.turns._base import Turn, Work, add_gradient
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import matching
from fedtune.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Ditto(Turn):
    """Trains the shared adapter w as usual, then a personal adapter v with μ/2·‖v − w_t‖² added to the loss; w_t is what the server sent.

    v starts from w_t in the client's first turn. It gets the same batches, steps and optimizer as w.

    Args:
        mu: μ (λ in the paper), per unit of squared distance in the parameters.
    """

    private: ClassVar[tuple[str, ...]] = ("user",)  # the personal adapter never leaves the client
    mu: float

    @property
    def passes(self) -> float:
        return 2.0

    def check(self) -> None:
        require("the turn's mu", self.mu, PlanError, ge=0)

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        assert work.retrain is not None and work.keep is not None
        work.keep(work.retrain(work.recall() or work.start, near(work.start, self.mu)))
        return trained

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        return kept or given


def near(sent: AdapterState, mu: float) -> Turn:
    """A turn whose loss has μ/2·‖v − w_t‖², with w_t = `sent`."""

    class Near(Turn):
        def begin(self, work: Work) -> Any:
            names = matching(work.live.parameters, work.plan.train)
            work.live.load(sent)
            anchors = [work.live.parameters[n].detach().clone() for n in names]
            work.live.load(work.start)
            return [(work.live.parameters[n], anchor) for n, anchor in zip(names, anchors, strict=True)]

        def step(self, work: Work, memory: Any) -> None:
            with torch.no_grad():
                for parameter, anchor in memory:
                    add_gradient(parameter, parameter - anchor, mu)

    return Near()

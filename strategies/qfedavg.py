"""q-FedAvg: clients with a higher loss get more weight. Uses Flower's class.

Source: Li et al. 2020, Fair Resource Allocation in Federated Learning, arXiv:1905.10497, algorithm 2.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.strategies import _flower

_LOSS = "start_loss"  # F_k(w): the client's loss before it trains


@dataclass(frozen=True, kw_only=True)
class QFedAvg(Strategy):
    """w ← w − Σ F_kᵠ·L(w − w_k) / Σ (q·F_kᵠ⁻¹·‖L(w − w_k)‖² + L·F_kᵠ), F_k = F_k(w).

    q = 0 is the unweighted mean over clients, regardless of their numbers of examples; a larger q is closer to minimax. The denominator
    shortens the step if ‖w − w_k‖² is large relative to F_k / (q·L). Holds all models of a round in memory.

    Args:
        q: Exponent of the losses.
        lr: 1 / L, where L estimates the Lipschitz constant of the gradient. The paper sets it to the client's learning rate of plain SGD.
            An adaptive optimizer moves further than learning rate times gradient, so with its rate here the model would barely move.
    """

    q: float = 0.1
    lr: float = 1.0

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, assumes_zero_init=False, extra_disclosure="an exact loss over their rows"
    )

    def check(self, config: Config) -> None:
        require("strategy.q", self.q, ge=0)
        require("strategy.lr", self.lr, gt=0)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return {
            p.client: Assignment(plan=dataclasses.replace(p, measure=tuple(dict.fromkeys((*p.measure, _LOSS)))), adapter=state.adapter)
            for p in plans
        }

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        by = flower.QFedAvg(client_learning_rate=self.lr, q=self.q, train_loss_key=_LOSS)
        by.current_arrays = _flower.arrays(state.adapter.tensors)
        replies = [
            _flower.reply(u.adapter.tensors, u.examples, start_loss=_flower.measured(u, u.metrics, _LOSS))
            for u in _flower.cohort(state, updates)
        ]
        adapter = _flower.aggregated(by, round, replies, state.adapter)
        return dataclasses.replace(state, adapter=adapter or state.adapter)

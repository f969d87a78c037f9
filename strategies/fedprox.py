"""FedProx: federated averaging with a proximal term that keeps clients near the global model.

Source: Li et al. 2020, Federated Optimization in Heterogeneous Networks, arXiv:1812.06127, algorithm 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.errors import ConfigError
from fedtune.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """Clients minimize F_k(w) + μ/2·‖w − w_t‖² over all tensors that they train; the server computes the weighted mean.

    For LoRA, the term applies to the factors, not to their product. Only `mu` sets it: a config with a different nonzero `client.prox` is
    rejected.

    Args:
        mu: μ, per unit of squared distance in the parameters; 0 is FedAvg.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    mu: float = 0.01

    def check(self, config: Config) -> None:
        require("strategy.mu", self.mu, ge=0)
        if config.client.prox not in (0.0, self.mu):
            raise ConfigError(
                f"strategy.mu={self.mu:g} and client.prox={config.client.prox:g} both set the proximal weight: leave client.prox at 0"
            )

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return {p.client: Assignment(plan=p.with_turn("fedprox", mu=self.mu), adapter=state.adapter) for p in plans}

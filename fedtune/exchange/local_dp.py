"""User-level privacy at the clients: each clips its update, adds noise before sending it, and keeps its own ledger.

The strategy gets the sum of the updates divided by the planned cohort size. All clients have equal weight, so one client's influence is
bounded.
"""

from dataclasses import dataclass

from fedtune.contracts.exchange import Channel, Exchange
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.privacy.user import SumOverCohort


@dataclass(frozen=True, kw_only=True)
class LocalDP(Exchange):
    """Δ ← Σ_k Δ_k / m over the received updates, which their clients have clipped and noised.

    Args:
        cohort: m, the planned cohort size.
    """

    cohort: int

    def run(self, round: int, state: ServerState, strategy: Strategy, channel: Channel) -> ServerState:
        total = SumOverCohort(state.adapter.tensors, self.cohort)
        for update in channel.train():
            total.add(update.adapter.tensors)
        return strategy.aggregate_mean(round, state, total.mean())

"""User-level privacy at the clients: each clips its update and adds noise before it is sent, and pays for it itself.

The strategy gets the sum of the updates over the cohort that was planned. Every client weighs the same: what one may change is bounded.
"""

from dataclasses import dataclass

from fedtune.contracts.exchange import Channel, Exchange
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.privacy.user import SumOverCohort


@dataclass(frozen=True, kw_only=True)
class LocalDP(Exchange):
    """Δ ← Σ_k Δ_k / m over the updates that came, which were clipped and noised by their clients.

    Args:
        cohort: m, the clients that a round is planned with.
    """

    cohort: int

    def run(self, round: int, state: ServerState, strategy: Strategy, channel: Channel) -> ServerState:
        total = SumOverCohort(state.adapter.tensors, self.cohort)
        for update in channel.train():
            total.add(update.adapter.tensors)
        return strategy.aggregate_mean(round, state, total.mean())

"""User-level privacy at the server: the strategy sees only the noised mean of clipped updates.

Only a sum is between the decoded updates and the strategy, so secure aggregation can compute it. Cohorts have a fixed size and are known
to the server, so no amplification by sampling is claimed: a client pays in full for each round in which its update counts, and for no
other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedtune.config import PrivacyConfig
from fedtune.contracts.exchange import Channel, Exchange
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.privacy.accounting import Spend, solve_noise
from fedtune.privacy.ledger import Ledger, ledger_file, most_spent
from fedtune.privacy.noise import source
from fedtune.privacy.user import PrivateMean, Tracker

CLIP = "clip"  # in ServerState.exchange: the C of the next round


@dataclass(frozen=True, kw_only=True)
class CentralDP(Exchange):
    """Δ ← ( Σ_k clip(Δ_k) + N(0, (zC)²I) ) / m; all clients have equal weight. See fedtune/privacy/user.py.

    Args:
        privacy: The config's privacy settings.
        cohort: m, the planned cohort size.
        rounds: Rounds of the run, which is the most turns of a client.
        seed: Seed of the run.
        folder: Folder of the ledgers.
    """

    privacy: PrivacyConfig
    cohort: int
    rounds: int
    seed: int
    folder: Path

    @property
    def noise(self) -> float:
        """z, the noise multiplier."""
        p = self.privacy
        if p.noise is not None:
            return p.noise
        assert p.epsilon is not None  # checked with the config
        return solve_noise(p.epsilon, p.delta, 1.0, max(1, p.turns or self.rounds), p.accountant)

    @property
    def tracker(self) -> Tracker:
        p = self.privacy
        return Tracker(quantile=p.clip_quantile, rate=p.clip_rate, noise=p.bit_noise)

    def start(self) -> Mapping[str, Tensor]:
        return {CLIP: torch.tensor(self.privacy.clip, dtype=torch.float64)}

    def exclusions(self, round: int, clients: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        """Clients for which another turn would exceed the budget."""
        p, out = self.privacy, dict[str, tuple[str, str]]()
        if p.epsilon is None:
            return out
        for client in clients:
            total = self._ledger(client).epsilon(p.delta, p.accountant, self._cost())
            if total > p.epsilon:
                out[client] = "privacy", f"another turn would cost ε = {total:.3f}, more than privacy.epsilon={p.epsilon:g}"
        return out

    def run(self, round: int, state: ServerState, strategy: Strategy, channel: Channel) -> ServerState:
        """Run one round. Each client's cost is in its ledger on disk before the strategy sees the mean."""
        p = self.privacy
        mean = PrivateMean(
            state.adapter.tensors,
            clip=self.clip(state),
            noise=self.noise,
            cohort=self.cohort,
            source=source(p.secure_rng, self.seed, "privacy", round),
            tracker=self.tracker if p.adaptive else None,
        )
        for update in channel.train():
            self._ledger(update.client).spend(round, self._cost(), "user")
            mean.add(update.adapter.tensors)
        tensors, clip = mean.close()
        after = strategy.aggregate_mean(round, state, tensors)
        return dataclasses.replace(after, exchange={CLIP: torch.tensor(clip if p.adaptive else p.clip, dtype=torch.float64)})

    def figures(self, round: int, before: ServerState, after: ServerState) -> Mapping[str, float]:
        """C and z of the round, and the ε of the client that has spent the most so far."""
        p = self.privacy
        # from all ledgers: a run resumed from an older checkpoint does not know the later participants
        most = most_spent(self.folder, p.delta, p.accountant)
        return {"dp_clip": self.clip(before), "dp_noise": self.noise, "epsilon": most}

    def clip(self, state: ServerState) -> float:
        """C of the next round."""
        return float(state.exchange[CLIP])

    def _cost(self) -> Spend:
        return Spend(noise=self.noise, rate=1.0, steps=1)

    def _ledger(self, client: str) -> Ledger:
        return Ledger(ledger_file(self.folder, client))

"""User-level privacy around a strategy: it sees one update, the private mean, and nothing of any single client.

A strategy fits if it asks no more of the updates than their mean (`Strategy.takes_mean`): to it, a round with one client whose update is
the mean is the same round. Between the decoded updates and the strategy stands only a sum, which secure aggregation can take over.

Cohorts are of a fixed size and known to the server, so that no amplification by sampling is claimed: a client pays in full for each round
that its update counts in, and not for others. Where clients add the noise themselves (`where=client`), they count; here is only the mean.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedtune.config import Config, PrivacyConfig
from fedtune.errors import ConfigError
from fedtune.plan import Plan, Update
from fedtune.privacy.accounting import Spend, solve_noise
from fedtune.privacy.ledger import Ledger, ledger_file, most_spent
from fedtune.privacy.noise import source
from fedtune.privacy.user import PrivateMean, Tracker
from fedtune.state import AdapterState
from fedtune.strategy import Assignment, ServerState, Strategy

_CLIP = "privacy.clip"  # in ServerState.memory: the C of the next round


def private_strategy(config: Config, strategy: Strategy, clients: int, folder: Path) -> Strategy:
    """`strategy`, with user-level privacy around it where the config asks for that.

    Args:
        config: The experiment.
        strategy: Its strategy.
        clients: How many there are.
        folder: Where the server keeps what each client has spent.

    Raises:
        ConfigError: The noise that it would take cannot be.
    """
    if config.privacy.kind != "user":
        return strategy
    cohort = min(config.clients_per_round, clients)
    made = PrivateCohort(inner=strategy, privacy=config.privacy, cohort=cohort, rounds=config.rounds, seed=config.seed, folder=folder)
    if config.privacy.adaptive:
        made.tracker.left(made.noise, made.cohort)
    return made


@dataclass(frozen=True, kw_only=True)
class PrivateCohort(Strategy):
    """A strategy on private means.

    Args:
        inner: The strategy.
        privacy: What is asked for.
        cohort: m, the clients that a round is planned with.
        rounds: Of the run: how many turns a client may have at most.
        seed: The run's.
        folder: Of the ledgers.
    """

    inner: Strategy
    privacy: PrivacyConfig
    cohort: int
    rounds: int
    seed: int
    folder: Path

    @property
    def noise(self) -> float:
        """z of the server; 0 where the clients have added their own."""
        p = self.privacy
        if p.where == "client":
            return 0.0
        if p.noise is not None:
            return p.noise
        assert p.epsilon is not None  # the config's check
        return solve_noise(p.epsilon, p.delta, 1.0, max(1, p.turns or self.rounds), p.accountant)

    @property
    def tracker(self) -> Tracker:
        p = self.privacy
        return Tracker(quantile=p.clip_quantile, rate=p.clip_rate, noise=p.bit_noise)

    def start(self, adapter: AdapterState) -> ServerState:
        return self._with_clip(self.inner.start(adapter), self.privacy.clip)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return self.inner.plan(round, plans, self._bare(state))

    def left_out(self, round: int, clients: Sequence[str]) -> Mapping[str, str]:
        """Clients whose budget another turn would exceed."""
        p = self.privacy
        if p.where == "client" or p.epsilon is None:
            return {}
        out = {}
        for client in clients:
            coming = self._ledger(client).epsilon(p.delta, p.accountant, self._cost())
            if coming > p.epsilon:
                out[client] = f"another turn would cost ε = {coming:.3f}, more than privacy.epsilon={p.epsilon:g}"
        return out

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The inner strategy's round on one update: the private mean. What it costs is on the disk before the state is handed on."""
        p, central, clip = self.privacy, self.privacy.where == "server", self.clip(state)
        mean = PrivateMean(
            state.adapter.tensors,
            clip=clip if central else math.inf,  # noised updates are long, and were clipped before
            noise=self.noise,
            cohort=self.cohort,
            source=source(p.secure_rng, self.seed, "privacy", round),
            tracker=self.tracker if p.adaptive else None,
        )
        first: Update | None = None
        for update in updates:
            first = first or update
            if central:
                self._ledger(update.client).spend(round, self._cost())
            mean.add(update.adapter.tensors)
        if first is None:
            raise ConfigError("a round without updates has no mean")
        tensors, clip = mean.close()
        alone = dataclasses.replace(first, client="", adapter=first.adapter.replace(tensors), examples=1, metrics={}, measurements={})
        return self._with_clip(self.inner.aggregate(round, self._bare(state), [alone]), clip if p.adaptive else self.privacy.clip)

    def notes(self, round: int, before: ServerState, after: ServerState) -> list[str]:
        return self.inner.notes(round, self._bare(before), self._bare(after))

    def figures(self, round: int, before: ServerState, after: ServerState, clients: Sequence[str]) -> Mapping[str, float]:
        """C and z of the round, and the ε of the client that has spent most so far."""
        p = self.privacy
        if p.where == "client":
            return {}
        # of all ledgers, and not of `clients`: a run that goes on from an older checkpoint no longer knows who took part since
        most = most_spent(self.folder, p.delta, p.accountant)
        return {"dp_clip": self.clip(before), "dp_noise": self.noise, "epsilon": most}

    def clip(self, state: ServerState) -> float:
        """C of the next round."""
        return float(state.memory[_CLIP])

    def _cost(self) -> Spend:
        return Spend(noise=self.noise, rate=1.0, steps=1)

    def _ledger(self, client: str) -> Ledger:
        return Ledger(ledger_file(self.folder, client))

    def _bare(self, state: ServerState) -> ServerState:
        return dataclasses.replace(state, memory={n: t for n, t in state.memory.items() if n != _CLIP})

    def _with_clip(self, state: ServerState, clip: float) -> ServerState:
        return dataclasses.replace(state, memory={**state.memory, _CLIP: torch.tensor(clip, dtype=torch.float64)})

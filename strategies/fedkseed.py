"""FedKSeed: clients and server exchange one number for each of K common random directions, whatever the size of the model.

Source: Qin et al. 2024, Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes, ICML
2024, arXiv:2312.06353, algorithm 1 and section 4.2 (probabilities); the authors' code: zhenqincn/FedKSeed.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.directions import CHANCES, MOST, SINCE, SUMS, TOTAL, candidate_seeds, replay
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.strategies._require import no_privacy

_SIZES, _START = "fedkseed.sizes", "fedkseed.start/"


@dataclass(frozen=True, kw_only=True)
class FedKSeed(Strategy):
    """w = w_0 − η·Σ_j a_j·z_j with a ← a + sum_k p_k a_k; a_k are the sums of the slopes of client k's steps along z_j.

    A message has the coefficients a: their total up to the last multiple of `snapshot` rounds, and one row for each round since. Everyone
    computes w from them in the same order, so a new client has the same bits as an old one, and rebuilding w costs at most
    K + snapshot·(directions used in a round) draws for each entry. At a snapshot, all rebuild w from w_0 once.

    Memory: `fedkseed.start/<tensor>` (w_0), `fedkseed.total` (K,), `fedkseed.since` (R, K), `fedkseed.sizes` (2, K).

    Args:
        candidates: K.
        eps: ε of the two-sided differences.
        chances: Probability variant (FedKSeed-Pro): seeds are drawn with softmax(minmax(mean |d|)); False draws them uniformly.
        clip: Bound of |d| in this mean.
        snapshot: Rounds after which the rows are added to the total.
        lr: The clients' learning rate η; `client.lr` sets it.
        seed: Seed of the directions; the run's.
    """

    requirements: ClassVar[Requirements] = Requirements(assumes_zero_init=False)
    candidates: int = 1024
    eps: float = 1e-2
    chances: bool = False
    clip: float = 0.5
    snapshot: int = 10
    lr: float = 1e-3
    seed: int = 0

    def check(self, config: Config) -> None:
        require("strategy.candidates", self.candidates, ge=1, le=MOST)
        require("strategy.eps", self.eps, gt=0)
        require("strategy.clip", self.clip, gt=0)
        require("strategy.snapshot", self.snapshot, ge=1)
        require("strategy.lr", self.lr, gt=0)
        no_privacy(config, "fedkseed")
        c = config.client
        if c.optimizer != "sgd" or c.schedule != "constant" or c.warmup_rounds or c.weight_decay:
            raise ConfigError(
                "strategy=fedkseed replays plain steps with one learning rate and without weight decay: set client.optimizer=sgd"
                " client.schedule=constant client.warmup_rounds=0 client.weight_decay=0"
            )
        if c.lr != self.lr:
            raise ConfigError(
                f"strategy.lr={self.lr:g} and client.lr={c.lr:g} differ, but the server replays the clients' steps:"
                f" set strategy.lr={c.lr:g}"
            )

    def start(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter=adapter, memory={_START + n: t for n, t in adapter.tensors.items()})

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        params = {"seed": self.seed, "candidates": self.candidates, "eps": self.eps, "clip": self.clip}
        extra = {n: t.float() for n, t in state.memory.items() if n in (TOTAL, SINCE)}
        if self.chances and _SIZES in state.memory:
            extra[CHANCES] = chances_of(state.memory[_SIZES]).float()
        nothing, expect = state.adapter.subset([]), state.adapter.replace({SUMS: torch.zeros(3, self.candidates)})
        return {p.client: Assignment(plan=p.with_turn("fedkseed", **params), adapter=nothing, extra=extra, expect=expect) for p in plans}

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        weight, slopes, sizes = 0, torch.zeros(self.candidates, dtype=torch.float64), torch.zeros(2, self.candidates, dtype=torch.float64)
        for update in updates:
            sums = update.adapter[SUMS].double()
            weight += update.examples
            slopes += update.examples * sums[0]
            # a client has one vote for each of its seeds, with a mean in the range that its turn reports
            used = sums[2] > 0
            sizes += torch.stack([torch.where(used, (sums[1] / sums[2].clamp(min=1)).clamp(0.0, self.clip), 0.0), used.double()])
        row = (slopes / weight).float()[None]
        memory = dict(state.memory)
        memory[_SIZES] = memory.get(_SIZES, torch.zeros_like(sizes)) + sizes
        since = torch.cat([memory[SINCE], row]) if SINCE in memory else row
        seeds = candidate_seeds(self.seed, self.candidates)
        if len(since) < self.snapshot:
            memory[SINCE] = since
            tensors = replay(state.adapter.tensors, row[0], seeds, self.lr)
        else:
            memory.pop(SINCE, None)
            memory[TOTAL] = (memory.get(TOTAL, torch.zeros(self.candidates)).double() + since.double().sum(0)).float()
            start = {n: memory[_START + n] for n in state.adapter.tensors}
            tensors = replay(start, memory[TOTAL], seeds, self.lr)
        return dataclasses.replace(state, adapter=state.adapter.replace(tensors), memory=memory)


def chances_of(sizes: Tensor) -> Tensor:
    """softmax(minmax(mean |d|)) (K,), given the sums of clients' means and the numbers of these, (2, K). An unused seed has mean 0."""
    mean = sizes[0] / sizes[1].clamp(min=1)
    return ((mean - mean.min()) / (mean.max() - mean.min() + 1e-10)).softmax(0)

"""Coordinate-wise median. Uses Flower's class.

Source: Yin et al. 2018, Byzantine-Robust Distributed Learning: Toward Optimal Statistical Rates, arXiv:1803.01498, algorithm 1, option I.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from flwr.serverapp import strategy as flower

from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.strategies import _flower


@dataclass(frozen=True, kw_only=True)
class FedMedian(Strategy):
    """w ← the coordinate-wise median of w_k. All clients have the same weight, regardless of their numbers of examples.

    For LoRA, the median is over the factors and depends on their gauge: (B G, G⁻¹ A) gives the same ΔW but a different median. Medians of
    the ΔW would need dense matrices and have full rank. Honest clients have similar gauges, because they start each round from the same
    factors. Holds all models of a round in memory. The median of one or two clients is their mean and gives no protection; `min_clients`
    sets the required number of updates.
    """

    requirements: ClassVar[Requirements] = Requirements(averages_entries=True, keeps_basis=True, assumes_zero_init=False)

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        replies = [_flower.reply(u.adapter.tensors, u.examples) for u in _flower.cohort(state, updates)]
        adapter = _flower.aggregated(flower.FedMedian(), round, replies, state.adapter)
        return dataclasses.replace(state, adapter=adapter or state.adapter)

"""Coordinate-wise median, by Flower's own class.

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
    """w ← the median of w_k, coordinate by coordinate; every client has the same weight, whatever its number of examples.

    For LoRA it takes the factors, and so depends on their gauge: (B G, G⁻¹ A) is the same ΔW with another median. Medians of the ΔW would
    need dense matrices and have full rank. Honest clients share a gauge to the extent that they start each round from the same factors.
    Holds all models of a round in memory. The median of one or two clients is their mean and protects against no attacker: `min_clients`
    sets how many must answer.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, assumes_zero_init=False)

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        replies = [_flower.reply(u.adapter.tensors, u.examples) for u in _flower.cohort(state, updates)]
        adapter = _flower.aggregated(flower.FedMedian(), round, replies, state.adapter)
        return dataclasses.replace(state, adapter=adapter or state.adapter)

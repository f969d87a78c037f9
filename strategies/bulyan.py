"""Bulyan: select clients by Krum scores, then average each coordinate near its median. Uses Flower's class.

Source: El Mhamdi, Guerraoui, Rouault 2018, The Hidden Vulnerability of Distributed Learning in Byzantium, arXiv:1802.07927, section 4.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.strategies import _flower
from fedtune.strategies._gram import distances, krum
from fedtune.strategies._require import enough_clients


@dataclass(frozen=True, kw_only=True)
class Bulyan(Strategy):
    """Keeps the n − 2f of n ≥ 4f + 3 clients with the lowest Krum scores, and averages the n − 4f values of each coordinate closest to its
    median.

    The scores compare s·B·A (see Krum) and do not depend on the gauge. The second stage does, because it averages the factors: (B G, G⁻¹ A)
    gives the same ΔW but a different median. Flower selects the n − 2f clients at once; the paper selects them one by one and reruns Krum
    on the rest each time. With fewer than 4f + 3 updates the state does not change. Holds all models of a round in memory.

    Args:
        malicious: f, the largest number of malicious clients in a round.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, assumes_zero_init=False)

    malicious: int = 1

    def check(self, config: Config) -> None:
        require("strategy.malicious", self.malicious, ge=0)
        enough_clients(config, "bulyan", 4 * self.malicious + 3, "4·malicious + 3")

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        cohort = _flower.cohort(state, updates)
        apart = distances([u.adapter for u in cohort], state.adapter)
        by = flower.Bulyan(
            num_malicious_nodes=self.malicious,
            selection_rule=lambda contents, f, theta: [contents[i] for i in krum(apart, malicious=f, select=theta)],
        )
        adapter = _flower.aggregated(by, round, [_flower.reply(u.adapter.tensors, u.examples) for u in cohort], state.adapter)
        return dataclasses.replace(state, adapter=adapter or state.adapter)

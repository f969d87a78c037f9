"""FedDPA: a shared and a local LoRA adapter on each client, and a weight that mixes them.

Source: Yang et al. 2024, Dual-Personalizing Adapter for Federated Foundation Models (FedDPA-T), NeurIPS 2024, arXiv:2403.19211. There, the
weight depends on each request; here, each client learns one (`clients/turns/feddpa.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.strategies._dual import DualAdapter


@dataclass(frozen=True, kw_only=True)
class FedDPA(DualAdapter):
    """The shared adapter is that of FedAvg with half the rank; a client's model is (1 − m)·shared + m·local. A turn trains twice.

    Args:
        mix: m before a client's first turn.
        mix_lr: Learning rate of m, once a turn; 0 keeps it.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, needs_only_mean=True, accepts_stale=True)
    mix: float = 0.5
    mix_lr: float = 0.1

    def check(self, config: Config) -> None:
        super().check(config)
        require("strategy.mix", self.mix, ge=0.05, le=1)
        require("strategy.mix_lr", self.mix_lr, ge=0)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        params = {"mix": self.mix, "mix_lr": self.mix_lr}
        return {p.client: Assignment(plan=p.with_turn("feddpa", **params), adapter=state.adapter) for p in plans}

"""FedDAT: a shared adapter, and on each client a teacher of two adapters that learns with it by mutual distillation.

Source: Chen et al. 2023, FedDAT: An Approach for Foundation Model Finetuning in Multi-Modal Heterogeneous Federated Learning,
arXiv:2308.12305, section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.contracts.task import task_of
from fedtune.errors import ConfigError
from fedtune.strategies._dual import DualAdapter


@dataclass(frozen=True, kw_only=True)
class FedDAT(DualAdapter):
    """S ← sum_k p_k S_k over the clients' shared adapters, of half the config's rank; the local adapters L stay on their clients.

    A step of a turn costs two gradients and two forward passes without gradients.

    Args:
        temperature: T of the distillation.
        weight: Factor of the distillation terms.
    """

    requirements: ClassVar[Requirements] = Requirements(keeps_basis=True, needs_only_mean=True, accepts_stale=True)
    temperature: float = 3.0
    weight: float = 1.0

    def check(self, config: Config) -> None:
        super().check(config)
        if not task_of(config.task).cross_entropy:
            raise ConfigError(
                f"strategy=feddat distills the choice of a class or a token, which task.kind={config.task.kind} does not make: take"
                " strategy=feddpa"
            )
        require("strategy.temperature", self.temperature, gt=0)
        require("strategy.weight", self.weight, ge=0)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        params = {"temperature": self.temperature, "weight": self.weight}
        return {p.client: Assignment(plan=p.with_turn("feddat", **params), adapter=state.adapter) for p in plans}

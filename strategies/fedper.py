"""FedPer: some tensors, such as the head, stay with each client; the others are averaged.

Source: Arivazhagan et al. 2019, Federated Learning with Personalization Layers, arXiv:1912.00818, algorithm 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, matching
from fedtune.contracts.strategy import Assignment, Requirements, ServerState
from fedtune.errors import ConfigError
from fedtune.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedPer(FedAvg):
    """w ← sum_k p_k w_k for the shared tensors; each client trains all tensors and keeps its local ones.

    The server's adapter has the local tensors' initial values, so a global evaluation measures an incomplete model: use the clients' own
    metrics.

    Args:
        local: Patterns of the local tensors, such as `*.layers.3.*`; empty: the head if the task has one, or else the adapter of the last
            layer.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, assumes_zero_init=False
    )
    local: Sequence[str] = field(default_factory=list)

    def start(self, adapter: AdapterState) -> ServerState:
        names, own = list(adapter.tensors), self._own(adapter)
        if not own or len(own) == len(names):
            what = "no tensor" if not own else "every tensor"
            examples = " and ".join(f"'{n}'" for n in dict.fromkeys((names[0], names[-1])))
            raise ConfigError(
                f"strategy.local={list(self.local)} selects {what} of the adapter, so there is nothing to"
                f" {'personalize' if not own else 'share'}: its tensors are such as {examples}"
            )
        return super().start(adapter)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        own = self._own(state.adapter)
        shared = [n for n in state.adapter.tensors if n not in own]
        sent = state.adapter.subset(shared)
        limits = {"send": tuple(shared), "keep": tuple(own)}
        return {p.client: Assignment(plan=self.turn(dataclasses.replace(p, **limits)), adapter=sent) for p in plans}

    def turn(self, plan: Plan) -> Plan:
        """The plan with the client half of the method."""
        return plan

    def _own(self, adapter: AdapterState) -> list[str]:
        if self.local:
            return matching(adapter.tensors, tuple(self.local))
        layers = {n: int(number) for n in adapter.tensors if (number := next((p for p in n.split(".") if p.isdigit()), ""))}
        backbone = {n.split(".")[0] for n in layers}  # embeddings are no head
        loose = [n for n in adapter.tensors if n not in layers and n.rpartition(".")[0] not in adapter.spec.ranks]
        heads = [n for n in loose if n.split(".")[0] not in backbone]
        return heads or [n for n, layer in layers.items() if layer == max(layers.values())]

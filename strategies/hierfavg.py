"""HierFAVG: devices average at edge servers in every round, and the edges average at the cloud after several rounds.

Source: Liu et al. 2020, Client-Edge-Cloud Hierarchical Federated Learning, arXiv:1905.06641, algorithm 1.
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
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.strategies._mean import Mean


@dataclass(frozen=True, kw_only=True)
class HierFAVG(Strategy):
    """Each round: w_e ← Σ n_k w_k / Σ n_k over the counted clients of edge e. Each `cloud_every` rounds: all w_e ← Σ n_e w_e / Σ n_e.

    n_e is the sum of n_k over edge e's updates since the last cloud step, so `cloud_every=1` is FedAvg. The server simulates all edges.
    Between cloud steps, its adapter is the mean that a cloud step would give. A client's edge follows from its id.

    Memory: `cloud/<tensor>`, the adapter of the last cloud step; `rounds`, the counted rounds since then; and for each edge with updates
    since then `edge/<e>/<tensor>` and `edge/<e>/examples`.

    Args:
        edges: Number of edge servers.
        cloud_every: Counted rounds between cloud steps (κ2).
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, assumes_zero_init=False, beyond_adapter=True
    )
    edges: int = 4
    cloud_every: int = 2

    def check(self, config: Config) -> None:
        require("strategy.edges", self.edges, ge=1)
        require("strategy.cloud_every", self.cloud_every, ge=1)

    def start(self, adapter: AdapterState) -> ServerState:
        return ServerState(adapter=adapter, memory=_at_cloud(adapter.tensors))

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        models = {e: self._model(e, state) for e in {self.edge_of(p.client) for p in plans}}
        return {p.client: Assignment(plan=p, adapter=models[self.edge_of(p.client)]) for p in plans}

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        like, means, memory = state.adapter.tensors, dict[int, Mean](), dict(state.memory)
        for update in updates:
            means.setdefault(self.edge_of(update.client), Mean()).add(update.adapter.tensors, update.examples)
        for e, mean in means.items():
            memory |= {f"edge/{e}/{n}": t for n, t in mean.of(like).items()}
            memory[f"edge/{e}/examples"] = memory.get(f"edge/{e}/examples", torch.zeros((), dtype=torch.float64)) + mean.weight
        cloud = Mean()
        for e in range(self.edges):
            if (examples := memory.get(f"edge/{e}/examples")) is not None:
                cloud.add({n: memory[f"edge/{e}/{n}"] for n in like}, float(examples))
        new = cloud.of(like)
        memory["rounds"] = memory["rounds"] + 1
        due = int(memory["rounds"]) >= self.cloud_every
        return dataclasses.replace(state, adapter=state.adapter.replace(new), memory=_at_cloud(new) if due else memory)

    def edge_of(self, client: str) -> int:
        """The edge of this client."""
        return derive_seed("edge", client) % self.edges

    def _model(self, edge: int, state: ServerState) -> AdapterState:
        """The adapter of the edge's last round, or else of the last cloud step."""
        source = f"edge/{edge}" if f"edge/{edge}/examples" in state.memory else "cloud"
        return state.adapter.replace({n: state.memory[f"{source}/{n}"] for n in state.adapter.tensors})


def _at_cloud(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The memory after a cloud step."""
    return {"rounds": torch.zeros((), dtype=torch.int64)} | {f"cloud/{n}": t for n, t in tensors.items()}

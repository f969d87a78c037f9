"""HetLoRA: each device trains at its own rank, and clients are weighted by the norm of their products.

A client of rank r_k gets the first r_k rows of A and columns of B. The server averages row i of A and column i of B (i from 0) over the
clients with r_k > i, with weights proportional to ‖B_k A_k‖_F; if there is no such client, both stay unchanged. Self-pruning (λ > 0): the
client's loss includes λ·‖B[:, ⌊γr⌋:]‖·‖A[⌊γr⌋:]‖. If a turn reduces this product, the client continues with rank ⌊γr⌋ in this and all later
rounds.

The paper (`variant: paper`) zero-pads the factors to the config's rank and averages over all clients. Component i then shrinks each round
by the weight of the clients with r_k ≤ i, even without training, and with mixed ranks the last components vanish (rank collapse, Wu et al.
2026, arXiv:2602.13486).
The paper prunes (λ > 0); `covered` does not by default. In the paper's variant, the padding zeros keep the last components small, so turns
increase them and rarely prune. Without these zeros, ranks fall every few turns, and trained components are lost.

The paper discusses only one matrix and does not specify these points. Our choices: each module has its own weights and its own rank; heads
are averaged with weights proportional to examples; the scaling s is the same at every rank, so that truncation leaves the rest of the
product unchanged; a row of A that no client trained stays unchanged. (In the paper's variant, its column of B is zero from the padding; if
both were zero, both gradients would vanish.)

Source: Cho et al. 2024, Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, arXiv:2401.06432.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.strategies._lowrank import FACTORS, norm, require_product
from fedtune.strategies._mean import Mean

_MIN_WEIGHT = 1e-30  # weight of a zero product: negligible compared with others, and equal for all clients if all products are zero


@dataclass(frozen=True, kw_only=True)
class HetLoRA(Strategy):
    """A[i] ← sum_k w_k A_k[i] / sum_k w_k over the clients with r_k > i, w_k = ‖B_k A_k‖_F; the same for B[:, i]; per module; not exact.

    A_k (r_k, in), B_k (out, r_k)  ->  A (r, in), B (out, r),  r_k <= r = the config's rank. Needs the memory of one model in float64.

    Args:
        variant: `covered`, as above; or `paper`: a client's missing components count as zeros.
        tail_penalty: λ of rank self-pruning; 0 disables it, the paper uses 1e-3.
        tail_share: γ, the share of the rank that pruning keeps, in (0, 1).
    """

    requirements: ClassVar[Requirements] = Requirements(mixes_ranks=True, keeps_basis=True)
    variant: str = "covered"
    tail_penalty: float = 0.0
    tail_share: float = 0.99

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method is not plain LoRA or a setting is out of range."""
        require_product(config, "hetlora", why="it cuts, pads and weighs LoRA's A and B")
        if self.variant not in ("covered", "paper"):
            raise ConfigError(f"strategy.variant={self.variant} is not known: choose covered or paper")
        require("strategy.tail_penalty", self.tail_penalty, ge=0)
        require("strategy.tail_share", self.tail_share, gt=0, lt=1)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        cuts: dict[tuple[int, ...], AdapterState] = {}  # clients of the same ranks share one adapter, which is encoded once
        given = {}
        for plan in plans:
            ranks = ranks_of(plan, state)
            key = tuple(ranks.values())
            if key not in cuts:
                cuts[key] = truncated(state.adapter, ranks)
            if self.tail_penalty:
                plan = plan.with_turn("hetlora", penalty=self.tail_penalty, share=self.tail_share)
            given[plan.client] = Assignment(plan=plan, adapter=cuts[key], may_prune=bool(self.tail_penalty))
        return given

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        spec, memory = state.adapter.spec, dict(state.memory)
        heads, factors = Mean(), {module: _Components(state.adapter, module) for module in spec.ranks}
        for update in updates:
            own = update.adapter
            heads.add({n: t for n, t in own.tensors.items() if not n.endswith(FACTORS)}, update.examples)
            for components in factors.values():
                components.add(own, padding_counts=self.variant == "paper")
            if self.tail_penalty:
                memory[f"rank/{update.client}"] = torch.tensor([own.spec.ranks[m] for m in sorted(spec.ranks)], dtype=torch.int32)
        tensors = {**state.adapter.tensors, **heads.of(state.adapter.tensors)}
        for components in factors.values():
            tensors.update(components.mean())
        return dataclasses.replace(state, adapter=state.adapter.replace(tensors), memory=memory)


class _Components:
    """Weighted means of one module's rows of A and columns of B, each over the clients that have it; float64.

    Args:
        adapter: The global adapter. Its rows and columns stay unchanged if no client has them.
        module: Name of the module.
    """

    def __init__(self, adapter: AdapterState, module: str) -> None:
        self._adapter, self._module = adapter, module
        self._a, self._b = (torch.zeros_like(adapter[module + f], dtype=torch.float64) for f in FACTORS)  # (r, in), (out, r)
        self._weight = torch.zeros(len(self._a), dtype=torch.float64)
        self._trained = 0  # rows of A that some client trained

    def add(self, own: AdapterState, *, padding_counts: bool) -> None:
        """Adds one client's factors; with `padding_counts`, the components beyond its rank count as zeros."""
        rank, spec = own.spec.ranks[self._module], self._adapter.spec
        a, b = padded(own, self._module, spec.ranks[self._module], spec.scaling[self._module])
        weight = max(norm((1.0, a, b)), _MIN_WEIGHT)
        self._a.add_(a, alpha=weight)
        self._b.add_(b, alpha=weight)
        self._weight[: None if padding_counts else rank] += weight
        self._trained = max(self._trained, rank)

    def mean(self) -> dict[str, Tensor]:
        """Both factors by name, in the adapter's dtypes."""
        names = [self._module + f for f in FACTORS]
        old_a, old_b = (self._adapter[n] for n in names)
        known = self._weight > 0
        weight = torch.where(known, self._weight, 1.0)
        a = torch.where(known[:, None], (self._a / weight[:, None]).to(old_a.dtype), old_a)
        b = torch.where(known, (self._b / weight).to(old_b.dtype), old_b)
        return dict(zip(names, (torch.cat([a[: self._trained], old_a[self._trained :]]), b), strict=True))


def ranks_of(plan: Plan, state: ServerState) -> dict[str, int]:
    """Module → this client's rank: the minimum of the global rank, the plan's rank and the client's pruned rank."""
    slot, pruned = state.adapter.spec.ranks, state.memory.get(f"rank/{plan.client}")
    ranks = {m: min(r, plan.rank or r) for m, r in slot.items()}
    if pruned is not None:  # sorted by module name: a checkpoint does not preserve the order of `spec.ranks`
        ranks = {m: min(ranks[m], r) for m, r in zip(sorted(slot), pruned.tolist(), strict=True)}
    return {m: ranks[m] for m in slot}


def truncated(adapter: AdapterState, ranks: Mapping[str, int]) -> AdapterState:
    """The first `ranks[module]` rows of each A and columns of each B, at the same scaling; heads unchanged."""
    if dict(ranks) == dict(adapter.spec.ranks):
        return adapter
    tensors = dict(adapter.tensors)
    for module, rank in ranks.items():
        tensors[f"{module}.lora_A"] = adapter[f"{module}.lora_A"][:rank]
        tensors[f"{module}.lora_B"] = adapter[f"{module}.lora_B"][:, :rank]
    return adapter.replace(tensors, ranks=dict(ranks))


def padded(adapter: AdapterState, module: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A module's factors in float64, zero-padded to `rank` and rescaled so that s·B·A with the new scaling equals the old product.

    A (r_k, in), B (out, r_k)  ->  A (rank, in), B (out, rank), each multiplied by √(s_k / s)
    """
    a, b = adapter[f"{module}.lora_A"].double(), adapter[f"{module}.lora_B"].double()
    if (own := adapter.spec.scaling[module]) != scaling:
        a, b = a * math.sqrt(own / scaling), b * math.sqrt(own / scaling)
    if missing := rank - len(a):
        a, b = pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
    return a, b

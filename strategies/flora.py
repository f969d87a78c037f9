"""Exact LoRA aggregation by stacking.

Averaging A and B separately does not average B·A. Stacking does, and lets each client choose its own rank:

    W += Σ_k p_k s_k B_k A_k = [B_1 … B_K] [p_1 s_1 A_1; …; p_K s_K A_K],    then a new random A, and B = 0.

This increases downstream traffic: each round adds a shift of rank Σ r_k, and every client gets each shift once. The shift holds the stacked
factors if this rank is at most min(in, out); otherwise it is reduced to its true rank. If a client's missing shifts have more numbers than
a weight matrix, it gets the sum of all shifts of that matrix instead (fedtune/rounds/snapshot.py); a device too small for it declines the
offer before the tensors are sent. While B = 0, A's gradient is 0, so the first step after the reset changes only B. If the run's initial B
is not 0 (peft.init=loftq), the part of its product that lower-rank clients did not receive is merged too.

Source: Wang et al. 2024, FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, arXiv:2409.05976,
eq. 5.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.seeds import derive_seed
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.strategies._lowrank import Cohort, Pair, Term, assign, compact, require_product, shift, stack, with_factors


@dataclass(frozen=True, kw_only=True)
class FLoRA(Strategy):
    """Concatenate the clients' factors along the rank axis, and merge the product into the frozen weights.

    A_k (r_k, in), B_k (out, r_k)  →  a shift A (R, in), B (out, R) of scaling 1, R = Σ r_k; heads: weighted mean.

    Args:
        max_rank: Largest R of a full cohort, in rows of A; None accepts any.
    """

    requirements: ClassVar[Requirements] = Requirements(mixes_ranks=True, assumes_zero_init=False)
    max_rank: int | None = None

    def check(self, config: Config) -> None:
        """Raises ConfigError if the method is not plain LoRA, or if a cohort's R could exceed `max_rank`."""
        require_product(
            config,
            "flora",
            why="it merges the mean of s·B·A into the frozen weights, which gives the clients' mean for plain LoRA only",
        )
        widest = max([config.peft.rank, *config.peft.rank_pattern.values()])
        rank = max((min(widest, d.rank or widest) for d in config.devices.classes.values()), default=widest)
        if self.max_rank is not None and config.clients_per_round * rank > self.max_rank:
            raise ConfigError(
                f"clients_per_round={config.clients_per_round} of rank {rank} stack to {config.clients_per_round * rank} rows, but"
                f" strategy.max_rank={self.max_rank}: raise it, or lower clients_per_round, peft.rank or the ranks in devices.classes"
            )

    def start(self, adapter: AdapterState) -> ServerState:
        """Derives the seed of all later A from the initial A, which comes from the run's seed."""
        drawn = b"".join(t.double().numpy().tobytes() for n, t in adapter.tensors.items() if n.endswith(".lora_A"))
        seed = derive_seed("flora", hashlib.sha256(drawn).hexdigest())
        return ServerState(adapter=adapter, memory={"seed": torch.tensor([seed])})

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        return assign(plans, state.adapter)

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        adapter, seed, cohort = state.adapter, int(state.memory["seed"]), Cohort.of(updates)
        merged = {m: _merge([*cohort.terms(m), *cohort.missed(adapter, m)]) for m in adapter.spec.ranks}
        new = {m: _fresh(adapter, m, derive_seed(seed, "flora", round, m)) for m in adapter.spec.ranks}
        return ServerState(
            adapter=with_factors(adapter, new, cohort.mean(adapter.tensors)),
            memory=state.memory,
            shifts=(*state.shifts, *shift(merged, base=adapter.spec.base, round=round)),
        )


def _merge(terms: list[Term]) -> Pair:
    a, b = stack(terms)
    return (a, b) if len(a) <= min(a.shape[1], len(b)) else compact(terms)


def _fresh(adapter: AdapterState, module: str, seed: int) -> tuple[Tensor, Tensor]:
    """LoRA's initialization: A from kaiming_uniform(a=√5), B = 0."""
    a, generator = torch.empty(adapter[f"{module}.lora_A"].shape), torch.Generator().manual_seed(seed)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator), torch.zeros_like(adapter[f"{module}.lora_B"])

"""FedNova: normalized averaging, so that more local steps do not give a client more weight.

If clients do different numbers of steps, the mean of their models minimizes a mixture of their losses weighted by these numbers. FedNova
averages the normalized changes and multiplies the result by the mean number of steps.

Source: Wang et al. 2020, Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, arXiv:2007.07481, eq. 8.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedtune.config import Config
from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import Requirements, ServerState, Strategy
from fedtune.strategies._flower import measured
from fedtune.strategies._mean import Mean, doubles
from fedtune.strategies._require import plain_sgd


@dataclass(frozen=True, kw_only=True)
class FedNova(Strategy):
    """w ← w − (Σ p_k‖a_k‖₁)·Σ p_k d_k, with d_k = (w − w_k) / ‖a_k‖₁ and p_k = n_k / Σ n.

    For plain SGD, η‖a_k‖₁ is the sum of the learning rates of the client's τ_k steps. Every update reports this sum as `lr_sum`. For a
    constant rate ‖a_k‖₁ = τ_k, and η cancels. Weight decay λ and a proximal term μ shrink the contribution of earlier steps. The paper
    includes this effect in a_k. Here it is omitted, a relative error of ‖a_k‖₁ of about τη(λ + μ)/2.

    Args:
        heuristic: Allow other local optimizers and clipping. AdamW's steps are then also normalized by `lr_sum`, but a client's change is
            no longer a sum of gradients, and the paper's result does not hold.
    """

    requirements: ClassVar[Requirements] = Requirements(averages_entries=True, keeps_basis=True, assumes_zero_init=False)

    heuristic: bool = False

    def check(self, config: Config) -> None:
        if not self.heuristic:
            plain_sgd(config, "fednova", ", or strategy.heuristic=true to normalize AdamW's steps without the paper's guarantee")

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        w, d, length = state.adapter.tensors, Mean(), 0.0
        for update in updates:
            norm = measured(update, update.measurements, "lr_sum")  # η‖a_k‖₁
            length += update.examples * norm
            # a rate of 0, as in the first step of a warm-up, changes nothing
            d.add({n: (t.double() - update.adapter[n].double()) / (norm or 1.0) for n, t in w.items()}, update.examples)
        step = d.of(doubles(w))
        after = {n: (t.double() - length / d.weight * step[n]).to(t.dtype) for n, t in w.items()}
        return dataclasses.replace(state, adapter=state.adapter.replace(after))

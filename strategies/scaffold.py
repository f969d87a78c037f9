"""SCAFFOLD: control variates correct the drift of the clients' local steps.

Each client steps along g − c_k + c. Its control variate c_k is its mean gradient in its last turn, and c is the mean of all c_k. If these
estimates are accurate, every client follows the global gradient.

Source: Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, arXiv:1910.06378, algorithm 1 (option
II).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.strategies._flower import measured
from fedtune.strategies._mean import Mean, doubles
from fedtune.strategies._require import plain_sgd, whole_updates


@dataclass(frozen=True, kw_only=True)
class SCAFFOLD(Strategy):
    """w ← w + η_s·(mean of w_k − w), uniform; c_k⁺ = c_k − c + (w − w_k) / Ση; c ← c + (1/N)·Σ_{k in S} (c_k⁺ − c_k).

    The control variates stay on the server, and clients send nothing extra: c_k⁺ follows from w_k and from Ση, the sum of the learning
    rates of the client's steps (τη in the paper, where the rate is constant). Every update reports Ση as `lr_sum`. The server sends
    c − c_k, which has the adapter's size.

    N counts the clients seen so far. A new client has c_k = c: it steps along its plain gradient, and c, the mean over the clients seen, is
    also the mean over all clients. (The paper starts c_k at 0, which adds all of c to a new client's gradient.) With full participation
    both are the same. Weight decay and a proximal term are part of the local objective and of c_k.

    Memory: `c/<tensor>`, and `c_k/<client>/<tensor>` for every client seen: one adapter each.

    Args:
        lr: Server learning rate η_s.
    """

    requirements: ClassVar[Requirements] = Requirements(averages_entries=True, keeps_basis=True, assumes_zero_init=False)

    lr: float = 1.0

    def check(self, config: Config) -> None:
        require("strategy.lr", self.lr, gt=0)
        plain_sgd(config, "scaffold")
        whole_updates(config, "scaffold")

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        given = {}
        for plan in plans:
            c, own = _mean_control(state), _control(state, plan.client)
            correction = {} if own is None else {n: c[n] - own[n] for n in c}
            given[plan.client] = Assignment(plan=plan.with_turn("scaffold"), adapter=state.adapter, extra=correction)
        return given

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        w, c = state.adapter.tensors, _mean_control(state)
        mean, memory = Mean(), dict(state.memory)
        moved = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in w.items()}
        for update in updates:
            mean.add(update.adapter.tensors, 1.0)
            lr_sum = measured(update, update.measurements, "lr_sum")
            if lr_sum == 0:  # as in the first step of a learning-rate warm-up: no change, so no gradient estimate
                continue
            own = _control(state, update.client) or c
            for n in w:
                new = own[n].double() - c[n].double() + (w[n].double() - update.adapter[n].double()) / lr_sum
                moved[n] += new - own[n].double()
                memory[f"c_k/{update.client}/{n}"] = new.float()
        seen = max(1, len(_seen(memory, w)))
        memory |= {f"c/{n}": (c[n].double() + moved[n] / seen).float() for n in w}
        old = doubles(w)
        after = {n: (old[n] + self.lr * (m - old[n])).to(w[n].dtype) for n, m in mean.of(old).items()}
        return dataclasses.replace(state, adapter=state.adapter.replace(after), memory=memory)


def _mean_control(state: ServerState) -> dict[str, Tensor]:
    """c, float32; 0 before the first round."""
    return {n: state.memory.get(f"c/{n}", torch.zeros_like(t, dtype=torch.float32)) for n, t in state.adapter.tensors.items()}


def _control(state: ServerState, client: str) -> dict[str, Tensor] | None:
    """c_k, float32; None for a new client."""
    names = state.adapter.tensors
    return {n: state.memory[f"c_k/{client}/{n}"] for n in names} if all(f"c_k/{client}/{n}" in state.memory for n in names) else None


def _seen(memory: Mapping[str, Tensor], names: Iterable[str]) -> set[str]:
    first = next(iter(names))
    return {n for n in memory if n.startswith("c_k/") and n.endswith(f"/{first}")}

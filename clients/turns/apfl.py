"""APFL's client half: a personal adapter v, mixed with the shared one by a weight α that the client learns.

Source: Deng et al. 2020, Adaptive Personalized Federated Learning, arXiv:2003.13461, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns._beside import Beside, gradients_of, put, scalar, set_gradients, values_of
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import PlanError

_ALPHA = "apfl.alpha"


@dataclass(kw_only=True)
class _Mixture:
    """The personal tensors v, their weight α, and the derivatives ⟨v − w, ∇f(v̄)⟩ of the turn's steps."""

    own: Beside
    alpha: float
    slopes: list[float]


@dataclass(frozen=True, kw_only=True)
class APFL(Turn):
    """w steps on f(w); v steps on f(v̄) with v̄ = α·v + (1 − α)·w, on the same rows. At the end, α falls by alpha_lr times its mean
    derivative. The personal adapter is v̄.

    The mixture is of the trained tensors, as in the paper; for LoRA, these are the factors, not their product.

    Args:
        alpha: α in the client's first turn.
        alpha_lr: Learning rate of α; 0 keeps it.
    """

    private: ClassVar[tuple[str, ...]] = ("user",)  # the personal adapter never leaves the client
    alpha: float
    alpha_lr: float

    @property
    def passes(self) -> float:
        return 2.0

    def check(self) -> None:
        require("the turn's alpha", self.alpha, PlanError, ge=0, le=1)
        require("the turn's alpha_lr", self.alpha_lr, PlanError, ge=0)

    def begin(self, work: Work) -> _Mixture:
        kept = work.recall()
        own = Beside(work, work.start if kept is None else _without_alpha(kept))
        return _Mixture(own=own, alpha=self.alpha if kept is None else scalar(kept, _ALPHA), slopes=[])

    def step(self, work: Work, memory: _Mixture) -> None:
        assert work.minibatch is not None
        w, of_w, alpha = values_of(work), gradients_of(work), memory.alpha
        with torch.no_grad():
            put(work, {n: alpha * v + (1 - alpha) * w[n] for n, v in memory.own.parameters.items()})
        work.minibatch.gradient()
        mixed = gradients_of(work)
        memory.slopes.append(sum(float(((memory.own.parameters[n].detach() - w[n]) * g).sum()) for n, g in mixed.items()))
        memory.own.step({n: alpha * g for n, g in mixed.items()})
        put(work, w)
        set_gradients(work, of_w)

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        assert work.keep is not None
        memory: _Mixture = work.memory
        alpha = memory.alpha - self.alpha_lr * sum(memory.slopes) / len(memory.slopes)
        own = memory.own.state()
        work.keep(own.replace({**own.tensors, _ALPHA: torch.tensor(min(1.0, max(0.0, alpha)), dtype=torch.float64)}))
        return trained

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        if kept is None:
            return given
        alpha, own = scalar(kept, _ALPHA), _without_alpha(kept)
        return given.replace({n: alpha * own[n] + (1 - alpha) * t for n, t in given.tensors.items()})


def _without_alpha(kept: AdapterState) -> AdapterState:
    tensors: dict[str, Tensor] = {n: t for n, t in kept.tensors.items() if n != _ALPHA}
    return kept.replace(tensors)

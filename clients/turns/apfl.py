"""APFL's client half: a personal adapter v, mixed with the shared one by a weight α that the client learns.

Source: Deng et al. 2020, Adaptive Personalized Federated Learning, arXiv:2003.13461, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns._beside import Beside, gradients_of, put, set_gradients, split_number, values_of, with_number
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
        own, alpha = (work.start, self.alpha) if kept is None else split_number(kept, _ALPHA)
        return _Mixture(own=Beside(work, own), alpha=alpha, slopes=[])

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
        work.keep(with_number(memory.own.state(), _ALPHA, min(1.0, max(0.0, alpha))))
        return trained

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        if kept is None:
            return given
        own, alpha = split_number(kept, _ALPHA)
        return given.replace({n: alpha * own[n] + (1 - alpha) * t for n, t in given.tensors.items()})

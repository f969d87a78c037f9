"""Dual adapters: beside the shared LoRA adapter G, each client trains a local one L; the personal model is (1 − m)·G + m·L.

Source: Yang et al. 2024, Dual-Personalizing Adapter for Federated Foundation Models (FedDPA-T), arXiv:2403.19211. There, m is chosen for
each request by its similarity to the client's rows. Here, the client learns m, as APFL does (arXiv:2003.13461).
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns._beside import Beside, gradients_of, set_gradients, split_number, with_number
from fedtune.clients.turns._mixture import mixture, of_first
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import PlanError

_MIX, _LEAST = "feddpa.mix", 0.05  # with a smaller m, L would hardly learn


@dataclass(frozen=True, kw_only=True)
class FedDPA(Turn):
    """Trains G as usual, then L inside the mixture with the received G fixed, and m by its mean derivative over L's steps.

    In the client's first turn, L starts from the received G. The mixture is exact in the products s·B·A; a head is mixed entry by entry.

    Args:
        mix: m in the client's first turn.
        mix_lr: Learning rate of m; 0 keeps it.
    """

    private: ClassVar[tuple[str, ...]] = ("user",)  # the personal adapter never leaves the client
    mix: float
    mix_lr: float

    @property
    def passes(self) -> float:
        return 2.0

    def check(self) -> None:
        require("the turn's mix", self.mix, PlanError, ge=_LEAST, le=1)
        require("the turn's mix_lr", self.mix_lr, PlanError, ge=0)

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        assert work.retrain is not None and work.keep is not None
        kept, shared = work.recall(), work.start
        local, mix = (shared, self.mix) if kept is None else split_number(kept, _MIX)
        inside = _Inside(shared, local, mix)
        work.retrain(mixture((mix, local), (1 - mix, shared)), inside)
        mix = min(1.0, max(_LEAST, mix - self.mix_lr * sum(inside.slopes) / len(inside.slopes)))
        work.keep(with_number(inside.own, _MIX, mix))
        return trained

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        if kept is None:
            return given
        own, mix = split_number(kept, _MIX)
        return mixture((mix, own), (1 - mix, given))


class _Inside(Turn):
    """Trains L inside m·L + (1 − m)·G, with an optimizer of L's own; the live slot holds the mixture.

    Args:
        shared: G.
        own: L.
        mix: m.

    Attributes:
        own: L, newly trained after each step.
        slopes: ∂f/∂m of each step.
    """

    def __init__(self, shared: AdapterState, own: AdapterState, mix: float) -> None:
        self._shared, self.own, self._mix = shared, own, mix
        self.slopes = list[float]()

    def begin(self, work: Work) -> Beside:
        return Beside(work, self.own)

    def step(self, work: Work, memory: Beside) -> None:
        gradients, own, mix = gradients_of(work), self.own, self._mix
        # ∂f/∂m: the mixture's B is [m·B_L, (1 − m)·B_G]
        slope = 0.0
        for name, gradient in gradients.items():
            rank = own.spec.ranks.get(name.rpartition(".")[0], 0)
            if rank and name.endswith(".lora_A"):
                continue
            ours, theirs = own[name].to(gradient.device), self._shared[name].to(gradient.device)
            parts = (gradient[:, :rank], gradient[:, rank : 2 * rank]) if rank else (gradient, gradient)
            slope += float((parts[0] * ours).sum() - (parts[1] * theirs).sum())
        self.slopes.append(slope)
        memory.step(of_first(gradients, own, mix))
        self.own = memory.state()
        work.live.load(mixture((mix, self.own), (1 - mix, self._shared)))
        set_gradients(work, {})  # the trainer's optimizer has nothing to do

"""Dual adapters: beside the shared LoRA adapter G, each client trains a local one L; the personal model is (1 − m)·G + m·L.

Source: Yang et al. 2024, Dual-Personalizing Adapter for Federated Foundation Models (FedDPA-T), arXiv:2403.19211. There, m is chosen for
each request by its similarity to the client's rows. Here, the client learns m, as APFL does (arXiv:2003.13461).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns._mixture import mixture, part_of
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.errors import PlanError

_MIX, _LEAST = "feddpa.mix", 0.05  # below this share, L is hardly trained


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
        kept = work.recall()
        shared = work.start
        local, mix = (shared, self.mix) if kept is None else (without_mix(kept), float(kept[_MIX]))
        inside = _Inside(shared, mix)
        got = work.retrain(mixture((1 - mix, shared), (mix, local)), inside)
        mix = min(1.0, max(_LEAST, mix - self.mix_lr * sum(inside.slopes) / len(inside.slopes)))
        work.keep(inside.local_of(got).replace({**inside.local_of(got).tensors, _MIX: torch.tensor(mix, dtype=torch.float64)}))
        return trained

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        if kept is None:
            return given
        mix = float(kept[_MIX])
        return mixture((1 - mix, given), (mix, without_mix(kept)))


class _Inside(Turn):
    """Trains L inside the mixture: G's factors are put back before each step and have no gradient.

    Args:
        shared: G.
        mix: m.
    """

    def __init__(self, shared: AdapterState, mix: float) -> None:
        self._shared, self._mix = shared, mix
        self.slopes = list[float]()

    def begin(self, work: Work) -> Any:
        return _Fixed(start=work.start)

    def step(self, work: Work, memory: "_Fixed") -> None:
        slope, live, mix = 0.0, work.live.parameters, self._mix
        with torch.no_grad():
            for name, parameter in live.items():
                if parameter.grad is None:
                    continue
                module, _, kind = name.rpartition(".")
                rank = self._shared.spec.ranks.get(module, 0)
                if rank and kind == "lora_A":
                    parameter[:rank].copy_(memory.start[name][:rank])  # weight decay moves entries without a gradient
                    parameter.grad[:rank] = 0.0
                elif rank and kind == "lora_B":
                    local = parameter[:, rank : 2 * rank] / mix
                    shared = self._shared[name].to(parameter.device)
                    slope += float((parameter.grad[:, rank : 2 * rank] * local).sum() - (parameter.grad[:, :rank] * shared).sum())
                    parameter[:, :rank].copy_(memory.start[name][:, :rank])
                    parameter.grad[:, :rank] = 0.0
                else:  # the head's value is (1 − m)·G + m·L
                    shared = self._shared[name].to(parameter.device)
                    slope += float((parameter.grad * (parameter - shared)).sum()) / mix
        self.slopes.append(slope)

    def local_of(self, mixed: AdapterState) -> AdapterState:
        """L, given the mixture."""
        mix, out = self._mix, part_of(mixed, self._shared)
        tensors: dict[str, Tensor] = {}
        for name, tensor in out.tensors.items():
            module, _, kind = name.rpartition(".")
            if module not in out.spec.ranks:
                tensors[name] = (tensor - (1 - mix) * self._shared[name]) / mix
            else:
                tensors[name] = tensor / mix if kind == "lora_B" else tensor
        return out.replace(tensors)


@dataclass(frozen=True, kw_only=True)
class _Fixed:
    """The mixture before the first step."""

    start: AdapterState = field(repr=False)


def without_mix(kept: AdapterState) -> AdapterState:
    return kept.replace({n: t for n, t in kept.tensors.items() if n != _MIX})

"""FedDAT's client half: a shared adapter and a teacher made of two adapters distill their answers into each other.

Source: Chen et al. 2023, FedDAT: An Approach for Foundation Model Finetuning in Multi-Modal Heterogeneous Federated Learning,
arXiv:2308.12305, section 3. This is its core for text, with LoRA in place of bottleneck adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.clients.turns._base import Turn, Work
from fedtune.clients.turns._beside import Beside, gradients_of, put, set_gradients, values_of
from fedtune.clients.turns._mixture import mixture, of_first
from fedtune.config.bounds import require
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import task_of
from fedtune.errors import PlanError
from fedtune.models.losses import training_logits


@dataclass(kw_only=True)
class _Pair:
    """The local adapter L in training, and the frozen adapter: what the server sent."""

    local: Beside
    frozen: AdapterState = field(repr=False)
    teacher: AdapterState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.combine()

    def combine(self) -> None:
        """Set the teacher, ½·L + ½·frozen with L first."""
        self.teacher = mixture((0.5, self.local.state()), (0.5, self.frozen))


@dataclass(frozen=True, kw_only=True)
class FedDAT(Turn):
    """In each step, on the same rows: the shared adapter S steps on CE + T²·KL(teacher ‖ S), then L on CE + T²·KL(S ‖ teacher).

    The teacher is ½·L + ½·(S as the server sent it), exact in the products s·B·A; a head is averaged. L starts from S in the client's first
    turn. The personal adapter is the teacher with the server's newest S.

    Args:
        temperature: T of both distillations.
        weight: Factor of the distillation terms; 0 trains S and L without each other.
    """

    private: ClassVar[tuple[str, ...]] = ("user",)  # the personal adapter never leaves the client
    temperature: float
    weight: float

    @property
    def passes(self) -> float:
        return 2.0 + 2 / 3

    def check(self) -> None:
        require("the turn's temperature", self.temperature, PlanError, gt=0)
        require("the turn's weight", self.weight, PlanError, ge=0)

    def begin(self, work: Work) -> _Pair:
        return _Pair(local=Beside(work, work.recall() or work.start), frozen=work.start)

    def loss(self, work: Work, memory: _Pair, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        shared = values_of(work)
        try:
            wanted = self._answers(work, memory.teacher, batch)
        finally:  # after an out-of-memory error, the trainer tries again with fewer rows
            _load(work, memory.frozen, shared)
        return self._loss(work, batch, wanted)

    def step(self, work: Work, memory: _Pair) -> None:
        assert work.minibatch is not None
        shared, of_shared = values_of(work), gradients_of(work)
        now, teacher = work.live.read(version=0), memory.teacher

        def loss(batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
            wanted = self._answers(work, now, batch)
            work.live.load(teacher)
            return self._loss(work, batch, wanted)

        work.minibatch.gradient(loss)
        memory.local.step(of_first(gradients_of(work), memory.frozen, 0.5))
        memory.combine()
        _load(work, memory.frozen, shared)
        set_gradients(work, of_shared)

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        assert work.keep is not None
        work.keep(work.memory.local.state())
        return trained

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        return given if kept is None else mixture((0.5, kept), (0.5, given))

    def _answers(self, work: Work, state: AdapterState, batch: Mapping[str, Tensor]) -> Tensor:
        """The logits of a fixed adapter, without dropout. The live slot then has this adapter."""
        work.live.load(state)
        work.live.model.eval()
        try:
            with torch.no_grad():
                return training_logits(work.live.model, batch, work.task)[0]
        finally:
            work.live.model.train()

    def _loss(self, work: Work, batch: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, int]:
        """CE + T²·KL(wanted ‖ live), summed."""
        logits, targets = training_logits(work.live.model, batch, work.task)
        t = self.temperature
        divergence = F.kl_div(F.log_softmax(logits / t, -1), F.log_softmax(wanted / t, -1), reduction="sum", log_target=True)
        return task_of(work.task).loss(logits, targets, "sum") + self.weight * t**2 * divergence, len(targets)


def _load(work: Work, state: AdapterState, values: Mapping[str, Tensor]) -> None:
    """Give the live slot the ranks of `state`, and these values."""
    work.live.load(state)
    put(work, values)

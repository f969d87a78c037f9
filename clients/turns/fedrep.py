"""FedRep's client half: first the local tensors are trained alone, then the shared ones alone.

Source: Collins et al. 2021, Exploiting Shared Representations for Personalized Federated Learning, arXiv:2102.07078, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.clients.steps import steps_of
from fedtune.clients.turns._base import Turn, Work
from fedtune.config.bounds import require
from fedtune.contracts.plan import matching
from fedtune.errors import PlanError


@dataclass(kw_only=True)
class _Phase:
    """The names of the local tensors, and the number of steps done."""

    local: frozenset[str]
    done: int = 0


@dataclass(frozen=True, kw_only=True)
class FedRep(Turn):
    """The first steps train the tensors of `plan.keep`, the others the rest; a tensor outside its phase does not change.

    Args:
        local_share: Share of the steps for the local tensors, in (0, 1).
    """

    private: ClassVar[tuple[str, ...]] = ("record", "user")
    local_share: float

    def check(self) -> None:
        require("the turn's local_share", self.local_share, PlanError, gt=0, lt=1)

    def begin(self, work: Work) -> _Phase:
        return _Phase(local=frozenset(matching(work.live.parameters, work.plan.keep)))

    def step(self, work: Work, memory: _Phase) -> None:
        steps = steps_of(work.plan, len(work.examples))
        # at least one step for each phase, if there are two steps
        first = memory.done < min(max(1, round(self.local_share * steps)), max(1, steps - 1))
        memory.done += 1
        for name in matching(work.live.parameters, work.plan.train):
            if (name in memory.local) != first:
                work.live.parameters[name].grad = None

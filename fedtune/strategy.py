"""What an aggregation strategy is: a frozen dataclass of settings, and three pure functions over explicit state."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedtune.plan import Plan, Update
from fedtune.state import AdapterState


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that a strategy knows between rounds; what is not here does not survive a restart.

    Args:
        adapter: The global adapter: what is evaluated, checkpointed and exported.
        memory: The strategy's own tensors, such as momenta.
    """

    adapter: AdapterState
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one client gets: its plan, and the tensors that it starts from."""

    plan: Plan
    adapter: AdapterState


class Strategy(Protocol):
    """One aggregation method.

    Pure: inputs are never changed, and the order of updates does not matter (the bridge folds them in the order of logical ids).
    `aggregate` takes an iterable and should fold it as it comes, so that the server's memory stays that of one model.
    """

    def start(self, adapter: AdapterState) -> ServerState:
        """The state before round 1."""
        ...

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        """Logical id → assignment, one for each plan of the cohort; `plans` carry the config's values, the method changes what it must."""
        ...

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The state after the round. The bridge calls it with at least one update and has checked each."""
        ...

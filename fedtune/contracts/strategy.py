"""Aggregation strategies: frozen dataclasses of settings, with pure functions of an explicit state."""

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The complete state between rounds; all other state is lost on a restart.

    Args:
        adapter: The global adapter, for evaluation, checkpoints and export.
        memory: The strategy's own tensors, such as momenta; they never leave the server.
        exchange: The exchange's own tensors, such as an adaptive clip norm.
        shifts: Updates merged into the frozen weights, oldest first: W = W0 + Σ s·B·A over all of them. Each is a state of method `lora`
            whose `spec.version` is its round. Clients, evaluation and export apply them; the server sends each client its missing shifts.
    """

    adapter: AdapterState
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    exchange: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: tuple[AdapterState, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The plan and tensors for one client.

    Args:
        plan: The client's plan.
        adapter: Tensors to send, possibly with this client's own ranks. It may omit tensors that the client has: its personal tensors
            (`plan.keep`), and those of the initial adapter, which the client draws from the seed.
        extra: Further tensors that the plan's turn needs, named like the adapter's, such as SCAFFOLD's c − c_k.
        expect: Names and shapes of the reply if it contains measurements instead of trained tensors; else None.
        may_prune: Whether the reply may have lower ranks than `adapter`.
        stretch: How many times as far as the optimizer's steps the turn may move an entry.
        recombines: Whether the turn multiplies or rotates trained tensors, so that an entry may move further than the optimizer's steps.
    """

    plan: Plan
    adapter: AdapterState
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    expect: AdapterState | None = None
    may_prune: bool = False
    recombines: bool = False
    stretch: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Features that a strategy supports or needs. The defaults are the safe values; each subclass of a strategy declares its own.

    Args:
        mixes_ranks: `plan` uses the ranks that device classes request.
        keeps_basis: A tensor's entries have the same meaning in every round. False if each round computes new factors: error feedback
            (`traffic.error_feedback`) then cannot add the residual of an older update.
        needs_only_mean: `aggregate` depends on the updates only through their weighted mean, and the strategy has `aggregate_mean`.
            Required by user-level privacy and secure aggregation.
        accepts_stale: A late update may be applied as a difference (fedtune/rounds/staleness.py). This requires that `aggregate` averages
            tensors of one adapter, and that all clients send the same tensors in all rounds.
        assumes_zero_init: Assumes B·A = 0 before round 1, so peft.init=loftq is rejected, and a warm start (peft.from) merges B·A into the
            frozen weights.
        averages_entries: Combines tensors entry by entry, whatever the entries mean. The factors of stacked experts
            (`peft.target_parameters`) need it, because their product is not s·B·A.
        beyond_adapter: A round can change more than the values of the adapter's tensors: it adds shifts to the frozen weights, or begins
            another stage. An outer optimizer (DiLoCo) cannot wrap such a strategy.
        extra_disclosure: What clients report besides trained tensors, such as exact losses; not covered by differential privacy.
    """

    mixes_ranks: bool = False
    keeps_basis: bool = False
    needs_only_mean: bool = False
    accepts_stale: bool = False
    assumes_zero_init: bool = True
    averages_entries: bool = False
    beyond_adapter: bool = False
    extra_disclosure: str = ""


class Strategy(abc.ABC):
    """One aggregation method.

    Pure: it never changes its inputs, and the order of updates does not matter (they come in the order of logical ids). `aggregate` takes
    an iterable and should process updates one at a time, so that the server needs memory for only one model.

    Attributes:
        requirements: Declared by each class; not inherited.
    """

    requirements: ClassVar[Requirements] = Requirements()

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "requirements" not in vars(cls):  # a subclass may plan or aggregate differently from its parent
            cls.requirements = Requirements()

    def check(self, config: Config) -> None:  # noqa: B027  most methods work with every config
        """Raises ConfigError if the method does not support this config. Runs before anything is loaded."""

    def start(self, adapter: AdapterState) -> ServerState:
        """The state before round 1."""
        return ServerState(adapter=adapter)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        """Logical id → assignment, one for each plan. `plans` contain the config's values; the strategy may change them."""
        return {plan.client: Assignment(plan=plan, adapter=state.adapter) for plan in plans}

    @abc.abstractmethod
    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The state after the round. The caller passes at least one update, all of them checked, and sets `adapter.spec.version`."""

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        """The state after a round, given only the mean of the updates: trained tensors by name, float64.

        With `requirements.needs_only_mean`, `aggregate` must give the same result for the weighted mean.
        """
        raise NotImplementedError(f"{type(self).__name__} needs each client's own update")

    def notes(self, round: int, before: ServerState, after: ServerState) -> list[str]:
        """Sentences about the round for the user; called after each successful round."""
        return []

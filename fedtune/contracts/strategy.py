"""What an aggregation strategy is: a frozen dataclass of settings, and pure functions over explicit state."""

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
    """All that a strategy knows between rounds; what is not here does not survive a restart.

    Args:
        adapter: The global adapter: what is evaluated, checkpointed and exported.
        memory: The strategy's own tensors, such as momenta; it never leaves the server.
        exchange: The exchange's own tensors, such as an adaptive clip norm.
        shifts: What has been merged into the frozen weights so far, oldest first: W = W0 + Σ s·B·A over all of them. Each is a state of
            method `lora` whose `spec.version` is the round that made it. Clients, evaluation and export apply them; the bridge sends a
            client those that it has missed.
    """

    adapter: AdapterState
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    exchange: Mapping[str, Tensor] = field(default_factory=dict)
    shifts: tuple[AdapterState, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one client gets.

    Args:
        plan: Its plan.
        adapter: The tensors that it is sent, possibly of its own ranks. What is left out it has already: its own (`plan.keep`), or the
            run's first adapter, which it draws from the seed.
        extra: Tensors that the plan's turn needs beside the adapter, under names of the adapter's, such as SCAFFOLD's c − c_k.
        expect: What the reply must look like, where it holds what the client measured instead of what it trained; else None.
        may_prune: Whether the reply may hold fewer ranks of a module than `adapter` does.
    """

    plan: Plan
    adapter: AdapterState
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    expect: AdapterState | None = None
    may_prune: bool = False


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a strategy allows, and what it needs of a run. The defaults are the safe ones; a subclass of a strategy declares its own.

    Args:
        mixes_ranks: `plan` follows the ranks that device classes ask for.
        keeps_basis: A tensor's entries mean the same from round to round. False where each round makes new factors, to which what an
            older update left out cannot be added (`traffic.error_feedback`).
        needs_only_mean: `aggregate` depends on the updates only through their weighted mean, and the strategy has `aggregate_mean`.
            Required by user-level privacy and secure aggregation.
        accepts_stale: An update of an older version may count in a later round by its difference (fedtune/rounds/staleness.py):
            `aggregate` takes a mean of tensors of the run's one adapter, and all clients send the same tensors in all rounds.
        assumes_zero_init: Assumes B·A = 0 before round 1, so that peft.init=loftq is rejected.
        extra_disclosure: What clients report besides trained tensors, such as exact losses; not covered by differential privacy.
    """

    mixes_ranks: bool = False
    keeps_basis: bool = False
    needs_only_mean: bool = False
    accepts_stale: bool = False
    assumes_zero_init: bool = True
    extra_disclosure: str = ""


class Strategy(abc.ABC):
    """One aggregation method.

    Pure: inputs are never changed, and the order of updates does not matter (the bridge folds them in the order of logical ids).
    `aggregate` takes an iterable and should fold it as it comes, so that the server's memory stays that of one model.

    Attributes:
        requirements: Declared by each class for itself, not inherited.
    """

    requirements: ClassVar[Requirements] = Requirements()

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "requirements" not in vars(cls):  # a subclass may plan or aggregate otherwise: what its parent declares is not known of it
            cls.requirements = Requirements()

    def check(self, config: Config) -> None:  # noqa: B027  most methods work with every config
        """Raises ConfigError, before anything is loaded, where the method makes no sense with this config."""

    def start(self, adapter: AdapterState) -> ServerState:
        """The state before round 1."""
        return ServerState(adapter=adapter)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        """Logical id → assignment, one for each plan of the cohort; `plans` carry the config's values, the method changes what it must."""
        return {plan.client: Assignment(plan=plan, adapter=state.adapter) for plan in plans}

    @abc.abstractmethod
    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """The state after the round. The bridge calls it with at least one update and has checked each; it sets `adapter.spec.version`."""

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        """The state after a round of which only the mean of the updates is known: trained tensors by name, float64.

        Where `requirements.needs_only_mean`, it is what `aggregate` does with the weighted mean.
        """
        raise NotImplementedError(f"{type(self).__name__} needs each client's own update")

    def notes(self, round: int, before: ServerState, after: ServerState) -> list[str]:
        """Sentences about the round for a person to read; the bridge asks after each round that counts."""
        return []

"""What an aggregation strategy is: a frozen dataclass of settings, and pure functions over explicit state."""

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fedtune.config import Config
from fedtune.plan import Plan, Update
from fedtune.state import AdapterState


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that a strategy knows between rounds; what is not here does not survive a restart.

    Args:
        adapter: The global adapter: what is evaluated, checkpointed and exported.
        memory: The strategy's own tensors, such as momenta; it never leaves the server.
        shifts: What has been merged into the frozen weights so far, oldest first: W = W0 + Σ s·B·A over all of them. Each is a state of
            method `lora` whose `spec.version` is the round that made it. Clients, evaluation and export apply them; the bridge sends a
            client those that it has missed.
    """

    adapter: AdapterState
    memory: Mapping[str, Tensor] = field(default_factory=dict)
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


class Strategy(abc.ABC):
    """One aggregation method.

    Pure: inputs are never changed, and the order of updates does not matter (the bridge folds them in the order of logical ids).
    `aggregate` takes an iterable and should fold it as it comes, so that the server's memory stays that of one model.

    Attributes:
        mixes_ranks: Whether `plan` heeds the ranks of device classes; a config that sets them is refused where it does not.
        keeps_basis: Whether a tensor's entries mean the same from round to round; not so where each round makes new factors, to which what
            was left out of an older update cannot be added (`traffic.error_feedback`).
        takes_mean: Whether `aggregate` asks no more of the updates than their mean: one update that is the mean of some makes the same
            state as they do. Only then can noise or a secure sum stand between the clients and the method.
        takes_late: Whether an update of an older version may count in a later round by what it adds (fedtune/late.py): so where `aggregate`
            takes a mean of tensors of the run's one adapter, and all send the same ones in all rounds. A subclass that plans or aggregates
            otherwise says so again.
        from_zero: Whether it takes the run's first product B·A for zero, which peft.init=loftq does not keep.
        tells: What it has clients tell beside trained tensors, such as exact losses, which privacy does not reach; "" for nothing.
    """

    mixes_ranks: ClassVar[bool] = False
    keeps_basis: ClassVar[bool] = True
    takes_mean: ClassVar[bool] = False
    takes_late: ClassVar[bool] = False
    from_zero: ClassVar[bool] = False
    tells: ClassVar[str] = ""

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

    def left_out(self, round: int, clients: Sequence[str]) -> Mapping[str, str]:
        """Clients of the cohort that must not be asked this round → why, such as a budget that is spent."""
        return {}

    def figures(self, round: int, before: ServerState, after: ServerState, clients: Sequence[str]) -> Mapping[str, float]:
        """Numbers for the round's line of the metrics; `clients` are all that have been asked in the run so far."""
        return {}

    def notes(self, round: int, before: ServerState, after: ServerState) -> list[str]:
        """Sentences about the round for a person to read; the bridge asks after each round that counts."""
        return []

"""What a turn is, and what it works with."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fedtune.config import TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.data import Example
from fedtune.models import LiveAdapter
from fedtune.models.sparse import SparseSlot


@dataclass(frozen=True, kw_only=True)
class Work:
    """One client's turn, as the method's client half sees it.

    Args:
        live: The model with the trainable tensors, loaded with `start`.
        start: The tensors that the turn starts from.
        plan: The server's plan.
        task: What the loss is.
        examples: The client's training rows, at least one.
        pad_id: Token id of the padding.
        extra: Tensors that the server sent for this turn beside the adapter (`Assignment.extra`).
        recall: Returns what the client kept in its last turn of this method; None where it has kept nothing.
        keep: Keeps a state for the client's next turn of this method.
        again: Trains once more in this round, from another start and as another turn; returns the trained tensors. Only in `finish`.
    """

    live: LiveAdapter | SparseSlot
    start: AdapterState
    plan: Plan
    task: TaskConfig
    examples: Sequence[Example]
    pad_id: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    recall: Callable[[], AdapterState | None] = lambda: None
    keep: Callable[[AdapterState], None] | None = None
    again: Callable[[AdapterState, "Turn"], AdapterState] | None = None


class Stack(Protocol):
    """Several clients' turns that train at once, as a batched form sees them.

    Attributes:
        rows: For each client that still trains, its number among all turns of the stack, (C,).
        views: Name → the clients' tensors, (C, *shape), with their gradients; a smaller rank is padded with zeros.
        trained: Names of the tensors that the plan trains.
        starts: The states that the turns started from, in the order of all turns.
        extras: What the server sent beside the adapter, in the order of all turns.
    """

    @property
    def rows(self) -> Sequence[int]: ...
    @property
    def views(self) -> Mapping[str, Tensor]: ...
    @property
    def trained(self) -> Sequence[str]: ...
    @property
    def starts(self) -> Sequence[AdapterState]: ...
    @property
    def extras(self) -> Sequence[Mapping[str, Tensor]]: ...


class Batch:
    """The batched form of a turn: `begin` and `step` for many clients at once. This one adds nothing.

    Args:
        turns: Each client's turn, of one class, with parameters of its own.
        stack: The clients.
    """

    def __init__(self, turns: Sequence[Any], stack: Stack) -> None:
        self.turns = turns

    def step(self, stack: Stack) -> None:
        """`Turn.step` of the clients that still train: change the gradients of `stack.views`."""


class Turn(abc.ABC):  # noqa: B024  a turn overrides what it needs
    """What a client does in a turn beside plain training. A subclass is a frozen dataclass; its fields are the plan's parameters.

    Attributes:
        private: Whether privacy.kind=record and =user cover all that the turn reports.
        batch: The batched form; None where clients take the turn one after the other.
    """

    private: ClassVar[bool] = False
    batch: ClassVar[type[Batch] | None] = None

    @property
    def trains(self) -> bool:
        """Whether the turn trains; otherwise `observe` is all that it does."""
        return True

    def check(self) -> None:  # noqa: B027  most turns take any parameters of the right type
        """Raises PlanError where a parameter is out of range."""

    def begin(self, work: Work) -> Any:
        """Before the first step: whatever `step` needs, such as a copy of the weights."""
        return None

    def step(self, work: Work, memory: Any) -> None:  # noqa: B027  the plain turn adds nothing
        """After each backward pass and before gradients are clipped: change the gradients of `work.live.parameters`."""

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        """After the last step: the tensors that are kept and sent, from the trained ones."""
        return trained

    def observe(self, work: Work) -> AdapterState:
        """Instead of training: what the client measures and sends."""
        raise NotImplementedError(f"{type(self).__name__} trains")

    def personal(self, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        """The adapter that the client is evaluated with: the one that it would use, given the server's and what it keeps itself."""
        return given


def add_gradient(parameter: Tensor, gradient: Tensor, alpha: float = 1.0) -> None:
    """Add alpha·gradient to a parameter's gradient, which may be missing."""
    if parameter.grad is None:
        parameter.grad = alpha * gradient
    else:
        parameter.grad.add_(gradient, alpha=alpha)


__all__ = ["Batch", "Stack", "Turn", "Work", "add_gradient"]

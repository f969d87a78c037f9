"""The base class of turns and the arguments of its methods."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fedtune.config import TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.data import Example
from fedtune.models import LiveAdapter, loss_sum
from fedtune.models.sparse import SparseSlot

Loss = Callable[[Mapping[str, Tensor]], tuple[Tensor, int]]  # a micro-batch → its summed loss, and its number of targets


class Minibatch(Protocol):
    """The rows of the current optimizer step, for `Turn.gradient` and `Turn.step`."""

    def gradient(self, loss: Loss | None = None) -> float:
        """Replace the gradients by those of the mean loss at the parameters' current values; returns the mean loss.

        The random numbers are those of the step's own backward pass, so dropout is the same.

        Args:
            loss: Another loss than the turn's.
        """
        ...

    def loss(self) -> float:
        """The mean loss at the parameters' current values, without gradients and with the same random numbers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """The arguments of one client's turn.

    Args:
        live: The model with the trainable tensors, loaded with `start`.
        start: The initial tensors of the turn.
        plan: The server's plan.
        task: The task, which defines the loss.
        examples: The client's training rows, at least one.
        pad_id: Token id of the padding.
        extra: Tensors that the server sent for this turn in addition to the adapter (`Assignment.extra`).
        recall: Returns the state that the client stored in its last turn of this method; None if there is none.
        keep: Stores a state for the client's next turn of this method.
        retrain: Trains again in this round, from another start and with another turn, and returns the trained tensors. Only for `finish`;
            None with privacy=record, whose gradients each cost ε.
        minibatch: The rows of the current step, for `gradient` and `step`; None with privacy=record.
        memory: What `begin` returned, for `finish`; None in a batch of clients.
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
    retrain: Callable[[AdapterState, "Turn"], AdapterState] | None = None
    minibatch: Minibatch | None = None
    memory: Any = None


class Stack(Protocol):
    """The turns of several clients that a batched form trains together.

    Attributes:
        rows: For each client that is still training, its index among all turns, (C,).
        views: Name → these clients' tensors, (C, *shape), with their gradients; smaller ranks are zero-padded.
        trained: Names of the tensors that the plan trains.
        starts: The initial states, in the order of all turns.
        extras: The server's extra tensors, in the order of all turns.
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


class BatchedTurn:
    """The batched form of a turn: `begin` and `step` for many clients at once. This base class is the form of the plain turn.

    Args:
        turns: The clients' turns, all of one class, each with its own parameters.
        stack: The clients.
    """

    def __init__(self, turns: Sequence[Any], stack: Stack) -> None:
        self.turns = turns

    def step(self, stack: Stack) -> None:
        """`Turn.step` of the clients that are still training: change the gradients of `stack.views`."""


class Turn(abc.ABC):  # noqa: B024  a turn overrides what it needs
    """The client side of a method. A subclass is a frozen dataclass; its fields are the plan's parameters.

    Attributes:
        private: The kinds of privacy (`record`, `user`) that cover everything that the turn reports.
        batched: The batched form; None if clients run the turn one at a time.
    """

    private: ClassVar[tuple[str, ...]] = ()
    batched: ClassVar[type[BatchedTurn] | None] = None

    @property
    def trains(self) -> bool:
        """Whether the turn trains; otherwise it only calls `observe`."""
        return True

    @property
    def passes(self) -> float:
        """Gradients that each step of the plan computes in all, for estimates of a device's time; a forward pass alone is a third."""
        return 1.0

    @property
    def sent_bytes(self) -> int | None:
        """Bytes of the update, for estimates of a device's time; None: those of the tensors of `plan.send`."""
        return None

    def check(self) -> None:  # noqa: B027  most turns take any parameters of the right type
        """Raises PlanError if a parameter is out of range."""

    def begin(self, work: Work) -> Any:
        """Before the first step: returns the `memory` that `step` and `finish` get, such as a copy of the weights."""
        return None

    def loss(self, work: Work, memory: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The summed loss of a micro-batch and its number of targets; with privacy=record, always the task's."""
        return loss_sum(work.live.model, batch, work.task)

    def gradient(self, work: Work, memory: Any) -> float:
        """In each step: set the gradients of `work.live.parameters`, and return the mean loss. With privacy=record, it is not called.

        A parameter without a gradient does not change.
        """
        assert work.minibatch is not None
        return work.minibatch.gradient()

    def step(self, work: Work, memory: Any) -> None:  # noqa: B027  the plain turn adds nothing
        """After the gradient is computed, before gradient clipping: change the gradients of `work.live.parameters`."""

    def finish(self, work: Work, trained: AdapterState) -> AdapterState:
        """After the last step: returns the tensors to keep and send."""
        return trained

    def observe(self, work: Work) -> AdapterState:
        """Instead of training: measure, and return the tensors to send."""
        raise NotImplementedError(f"{type(self).__name__} trains")

    @classmethod
    def personal(cls, given: AdapterState, kept: AdapterState | None) -> AdapterState:
        """The client's personal adapter, for its evaluation and for an export.

        Args:
            given: The server's adapter.
            kept: The state from `work.keep`; None if there is none.
        """
        return given

    @classmethod
    def is_personal(cls) -> bool:
        """Whether clients have a personal adapter besides the tensors of `plan.keep`."""
        return cls.personal.__func__ is not Turn.personal.__func__


def add_gradient(parameter: Tensor, gradient: Tensor, alpha: float = 1.0) -> None:
    """Add alpha·gradient to a parameter's gradient, which may be None."""
    if parameter.grad is None:
        parameter.grad = alpha * gradient
    else:
        parameter.grad.add_(gradient, alpha=alpha)


__all__ = ["BatchedTurn", "Loss", "Minibatch", "Stack", "Turn", "Work", "add_gradient"]

"""Requests to a scheduler and their outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedtune.errors import RunError
from fedtune.inference.engine.sample import Sampling

End = Literal["stop", "length", "timeout", "stopping", "failed"]


class Busy(RunError):
    """The queue is full."""


class Stopping(RunError):
    """The scheduler accepts no new requests."""


@dataclass(frozen=True, slots=True)
class Output:
    """The output of one pass for an answer.

    Args:
        text: Final text; may be empty.
        token: The new token; None if the answer ends without one.
        logprob: The token's log-probability (natural) under the unmodified model; None unless requested.
        rivals: The requested number of most likely tokens and their log-probabilities, best first.
        end: Why the answer ends here; None if it continues.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    rivals: tuple[tuple[int, float], ...] = ()
    end: End | None = None


@dataclass(kw_only=True, eq=False)
class GenerationRequest:
    """One generation request.

    Args:
        ids: Tokens of the prompt.
        sampling: Sampling settings, including stop strings.
        max_new_tokens: Longest answer.
        deliver: Called with every Output on the scheduler's thread, the last with an `end`; must not block.
        joins: Whether the answer continues the prompt's text, so that a space between the two is part of it.
        adapter: Name of a separate adapter; None is the model itself.
        rivals: Number of most likely tokens to return per token; None returns no log-probabilities.
        deadline: On time.monotonic()'s clock; the answer then ends with "timeout".

    Attributes:
        answered: Tokens of the answer so far.
        cached: Tokens of the prompt found in the cache.
    """

    ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    deliver: Callable[[Output], None]
    joins: bool = False
    adapter: str | None = None
    rivals: int | None = None
    deadline: float = float("inf")
    answered: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)
    canceled: bool = field(default=False, init=False)

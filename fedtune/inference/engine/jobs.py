"""What a scheduler is asked, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedtune.errors import RunError
from fedtune.inference.engine.sample import Sampling

End = Literal["stop", "length", "timeout", "stopping", "failed"]


class Busy(RunError):
    """As many requests wait as may wait."""


class Stopping(RunError):
    """The scheduler takes no new requests any more."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one pass adds to an answer.

    Args:
        text: Certain now; may be empty.
        token: The new token; None where the answer just ends.
        logprob: Of the token by the model itself, natural logarithm; None unless asked for.
        rivals: The likeliest tokens and their logarithms, best first, as many as asked for.
        end: Why the answer ends here; None where it goes on.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    rivals: tuple[tuple[int, float], ...] = ()
    end: End | None = None


@dataclass(kw_only=True, eq=False)
class Job:
    """One request.

    Args:
        ids: Tokens of the prompt.
        sampling: How to draw; its stop strings end the answer.
        max_new_tokens: Longest answer.
        deliver: Told every Output on the scheduler's thread, the last one with an `end`; must not block.
        joins: The answer's text goes on from the prompt's, so that a space between the two belongs to it; else it stands alone.
        adapter: Name of a separate adapter; None is the model itself.
        rivals: How many likeliest tokens to tell with each token; None tells no log-probability either.
        deadline: By time.monotonic(); the answer ends there with "timeout".

    Attributes:
        answered: Tokens of the answer so far.
        cached: Tokens of the prompt that an earlier request had left in the cache.
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
    cancelled: bool = field(default=False, init=False)

"""The plain turn: the plan's optimizer on the task's loss."""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.clients.turns._base import BatchedTurn, Turn


@dataclass(frozen=True, kw_only=True)
class Plain(Turn):
    """Trains without method-specific additions."""

    private: ClassVar[tuple[str, ...]] = ("record", "user")
    batched: ClassVar[type[BatchedTurn] | None] = BatchedTurn

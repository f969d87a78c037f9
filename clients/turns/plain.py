"""The plain turn: the plan's optimizer on the task's loss, and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from fedtune.clients.turns._base import Batch, Turn


@dataclass(frozen=True, kw_only=True)
class Plain(Turn):
    """Adds nothing to training."""

    private: ClassVar[bool] = True
    batch: ClassVar[type[Batch] | None] = Batch

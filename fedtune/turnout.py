"""What became of one cohort in one round."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fedtune.plan import Update


@dataclass
class Turnout:
    """What became of one cohort.

    Args:
        records: Client → its line of the metrics.
        heaviest: Largest weight that a client may have, in examples; None bounds nobody.
        dropped: Kind of the reason → how many clients.
        counted: Updates that came in time and count.
        late: Client whose late reply counts → how many rounds late.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    heaviest: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    counted: int = 0
    examples: int = 0
    loss: float = 0.0
    late: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> int:
        """Updates that count, late ones too."""
        return self.counted + len(self.late)

    def weigh(self, update: Update) -> Update:
        """The update as a strategy sees it: its `examples`, the weight of every mean, are those that its client may have."""
        if self.heaviest is not None and update.examples > self.heaviest:
            self.records[update.client]["weight"] = self.heaviest
            update = dataclasses.replace(update, examples=self.heaviest)
        if update.client not in self.late:
            self.counted += 1
            if "train_loss" in update.metrics:
                self.examples += update.examples
                self.loss += update.examples * update.metrics["train_loss"]
        return update

    def drop(self, client: str, kind: str, why: str) -> None:
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        self.records[client]["dropped"] = f"{kind}: {why}"

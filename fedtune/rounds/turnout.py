"""What became of one cohort in one round."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from fedtune.contracts.plan import Update
from fedtune.rounds.membership import plain


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

    def summary(self, round: int, cohort: int, *, may_be_late: bool) -> dict[str, Any]:
        """The round's own line of the metrics, for a cohort of so many."""
        rows = self.records.values()
        record: dict[str, Any] = {"round": round, "client": None, "cohort": cohort, "counted": self.counted, "dropped": self.dropped}
        if may_be_late:
            record["late_used"] = len(self.late)
        if self.late:
            record["staleness"] = sum(self.late.values()) / len(self.late)  # rounds, their mean
        if self.examples:
            record["train_loss"] = self.loss / self.examples
        record["bytes_down"] = sum(r.get("bytes_down", 0) for r in rows)
        record["bytes_up"] = sum(r.get("bytes_up", 0) for r in rows)
        if peaks := [r["peak_mb"] for r in rows if "peak_mb" in r]:  # a private turn keeps it to itself
            record["peak_mb"] = max(peaks)
        return record


def refusal(reply: Message) -> tuple[str, str] | None:
    """Why a reply holds no result, its kind and a sentence; None where it may hold one."""
    if reply.has_error():
        said = (reply.error.reason or "").strip() or f"Flower's error {reply.error.code}"
        return "failed", plain(said.splitlines()[-1], 300)
    if "declined" not in reply.content.config_records:
        return None
    declined = reply.content.config_records["declined"]
    kind = str(declined.get("kind", ""))[:20]
    return kind if kind.isidentifier() else "failed", plain(declined.get("why", ""))


def epsilon_of(reply: Message) -> float | None:
    """What a client that declines says that it has spent: a reply that it paid for may have been lost."""
    if reply.has_error():
        return None
    said = reply.content.config_records["declined"].get("epsilon")
    return said if isinstance(said, float) and 0 <= said < math.inf else None

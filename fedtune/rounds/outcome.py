"""The outcome of one round for each client of its cohort."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from fedtune.contracts.plan import Update
from fedtune.rounds.membership import printable


@dataclass
class RoundOutcome:
    """The outcome of one round for each client.

    Args:
        records: Client → its line of the metrics.
        max_weight: Largest weight of a client, in examples; None sets no limit.
        dropped: Kind of reason → number of dropped clients.
        counted: Number of valid updates that arrived in time.
        examples: Sum of the weights of those among them that have a train_loss.
        loss: Weighted sum of their train_loss.
        late: Client whose late update is used → its staleness in rounds.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_weight: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    counted: int = 0
    examples: int = 0
    loss: float = 0.0
    late: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> int:
        """Number of valid updates, including late ones."""
        return self.counted + len(self.late)

    def weigh(self, update: Update) -> Update:
        """Count the update, and return it with its weight `examples` limited to `max_weight`."""
        if self.max_weight is not None and update.examples > self.max_weight:
            self.records[update.client]["weight"] = self.max_weight
            update = dataclasses.replace(update, examples=self.max_weight)
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
        """The round's line of the metrics, for a cohort of `cohort` clients."""
        rows = self.records.values()
        record: dict[str, Any] = {"round": round, "client": None, "cohort": cohort, "counted": self.counted, "dropped": self.dropped}
        if may_be_late:
            record["late_used"] = len(self.late)
        if self.late:
            record["staleness"] = sum(self.late.values()) / len(self.late)  # mean, in rounds
        if self.examples:
            record["train_loss"] = self.loss / self.examples
        record["bytes_down"] = sum(r.get("bytes_down", 0) for r in rows)
        record["bytes_up"] = sum(r.get("bytes_up", 0) for r in rows)
        if start := sum(r.get("bytes_start", 0) for r in rows):  # the part of bytes_down that is the start of a warm start
            record["bytes_start"] = start
        if peaks := [r["peak_mb"] for r in rows if "peak_mb" in r]:  # a private turn does not report it
            record["peak_mb"] = max(peaks)
        return record


def refusal(reply: Message) -> tuple[str, str] | None:
    """The reason why a reply has no result, as (kind, sentence); None if it may have a result."""
    if reply.has_error():
        why = (reply.error.reason or "").strip() or f"Flower's error {reply.error.code}"
        return "failed", printable(why.splitlines()[-1], 300)
    if "declined" not in reply.content.config_records:
        return None
    declined = reply.content.config_records["declined"]
    kind = str(declined.get("kind", ""))[:20]
    return kind if kind.isidentifier() else "failed", printable(declined.get("why", ""))


def epsilon_of(reply: Message) -> float | None:
    """The ε that a declining client reports as spent. It may include the cost of a reply that was lost."""
    if reply.has_error():
        return None
    spent = reply.content.config_records["declined"].get("epsilon")
    return spent if isinstance(spent, float) and 0 <= spent < math.inf else None

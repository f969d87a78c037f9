"""The minimum privacy that a device's operator accepts, set on the device's command line. No server can lower it.

fedtune/contracts/privacy_terms.py compares a server's plan with its hello, which detects mistakes, but not lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import Decline
from fedtune.privacy.accounting import epsilon
from fedtune.privacy.ledger import Ledger, ledger_file
from fedtune.privacy.turn import TurnPrivacy

KINDS = ("record", "user")  # in order of protection


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The minimum privacy of every turn.

    Args:
        kind: Unit that a turn must protect on the device: `record` (single rows) or `user` (all the client's data).
        epsilon: Budget of all turns together, over all runs of the device; None is unlimited.
        delta: δ of `epsilon`.
        client: Logical id.
        runs: Folder of all runs' folders; a run's ledgers are in its `privacy/`.
    """

    kind: str
    epsilon: float | None
    delta: float
    client: str
    runs: Path

    def check(self, privacy: str) -> None:
        """Raises Decline if a plan or an experiment has less privacy than `kind`."""
        if privacy not in KINDS[KINDS.index(self.kind) :]:
            raise Decline(
                "privacy",
                f"this device needs at least privacy={self.kind} (--min-privacy), but the server asks for privacy={privacy}",
            )

    def check_budget(self, turn: TurnPrivacy) -> None:
        """Raises Decline if the turn would exceed the budget.

        Raises:
            CheckpointError: A ledger cannot be read, so the spent budget is unknown.
        """
        if self.epsilon is None:
            return
        if self.kind == "user" and (run := next((run.name for run, ledger in self._ledgers() if "record" in ledger.units()), None)):
            raise Decline(
                "privacy",
                f"this device took part in the run {run} with privacy=record, whose ε is for single rows, so nothing bounds the ε of all"
                " its rows together: start it with --min-privacy record",
            )
        total = epsilon([*(cost for _, ledger in self._ledgers() for cost in ledger.spent()), turn.cost], self.delta)
        if not total <= self.epsilon:
            raise Decline(
                "privacy",
                f"this device's budget over all runs is ε = {self.epsilon:g} at δ = {self.delta:g} (--max-epsilon), and with this turn the"
                f" total would be {total:.3f}",
            )

    def _ledgers(self) -> Iterator[tuple[Path, Ledger]]:
        """The folder of each run of this device, and its ledger."""
        for run in sorted(path for path in self.runs.iterdir() if path.is_dir()):
            yield run, Ledger(ledger_file(run / "privacy", self.client))

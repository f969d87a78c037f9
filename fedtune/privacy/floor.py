"""The least privacy that a device's operator accepts, given on the device's own command line: no word of a server lowers it.

fedtune/contracts/privacy_terms.py compares what a server says in its plan with what it said in its hello, which stops a mistake and no lie.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import Decline
from fedtune.privacy.accounting import Spend, epsilon
from fedtune.privacy.ledger import Ledger, ledger_file
from fedtune.privacy.turn import Applied

KINDS = ("record", "user")  # each hides more than the one before


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What a turn must keep to.

    Args:
        kind: Whose traces a turn must hide on the device itself: a single row's, or all of the client's (which hides its rows too).
        epsilon: Most that all turns may cost together, in every run that the device has taken part in; None bounds nothing.
        delta: δ of `epsilon`.
        client: Logical id.
        runs: Folder of all runs' folders; a run's ledgers are in `privacy/` in its own.
    """

    kind: str
    epsilon: float | None
    delta: float
    client: str
    runs: Path

    def check(self, privacy: str) -> None:
        """Raises Decline where a plan, or a whole experiment, has the client do less than `kind`."""
        if privacy not in KINDS[KINDS.index(self.kind) :]:
            raise Decline(
                "privacy",
                f"this device applies privacy={self.kind} at least (--min-privacy), and the server asks it for privacy={privacy}",
            )

    def check_budget(self, turn: Applied) -> None:
        """Raises Decline where the turn would cost more than is left.

        Raises:
            CheckpointError: A ledger cannot be read: what was spent is not known.
        """
        if self.epsilon is None:
            return
        coming = epsilon([*self._spent(), turn.cost], self.delta)
        if not coming <= self.epsilon:
            raise Decline(
                "privacy",
                f"this device gives up ε = {self.epsilon:g} at δ = {self.delta:g} over all runs (--max-epsilon), and this turn makes it"
                f" {coming:.3f}",
            )

    def _spent(self) -> Iterator[Spend]:
        for run in sorted(path for path in self.runs.iterdir() if path.is_dir()):
            yield from Ledger(ledger_file(run / "privacy", self.client)).spent()

"""What each client has spent, on disk, for the whole run: one file a client, one line a turn.

A line is written and flushed to the disk before the turn that it pays for begins, so that no kill can lose what was spent; a turn that is
taken again after a kill is paid for again. Only where a kill cut the line itself off is nothing owed: its turn had not begun.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.errors import CheckpointError
from fedtune.privacy.accounting import Spend, epsilon
from fedtune.storage.atomic import flush
from fedtune.storage.ids import file_name
from fedtune.storage.parsing import content_of
from fedtune.storage.reading import read_object


def ledger_file(folder: Path, client: str) -> Path:
    """The ledger of a client in `folder`."""
    return folder / f"{file_name(client)}.jsonl"


def ledgers_in(folder: Path) -> Callable[[str], "Ledger"]:
    """Client → its ledger in `folder`."""
    return lambda client: Ledger(ledger_file(folder, client))


def most_spent(folder: Path, delta: float, accountant: str) -> float:
    """ε at δ of the client that has spent most, of all that have a ledger in `folder`; 0 where nobody has."""
    return max((Ledger(path).epsilon(delta, accountant) for path in sorted(folder.glob("*.jsonl"))), default=0.0)


@dataclass(frozen=True)
class _Turn(Spend):
    """A line: what a turn cost."""

    round: int


class Ledger:
    """One client's.

    Args:
        path: Its file; it and its folder are made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def spent(self) -> list[Spend]:
        """Everything so far, in order.

        Raises:
            CheckpointError: A line cannot be read: what was spent is not known, so that nothing more may be.
        """
        try:
            text = content_of(self.path)
        except FileNotFoundError:
            return []
        except OSError as bad:
            raise CheckpointError(f"the privacy ledger {self.path} cannot be read ({bad.strerror})") from None
        return [self._line(number, line) for number, line in enumerate(text.split(b"\n")[:-1], 1)]

    def spend(self, round: int, cost: Spend) -> None:
        """Add a turn; when this returns, the disk has it.

        Raises:
            CheckpointError: It cannot be written.
        """
        line = json.dumps({"round": round, **asdict(cost)}).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
                file.truncate(whole)
                file.write(line)
            flush(self.path)
            flush(self.path.parent)  # a new file's name must survive too
        except OSError as bad:
            raise CheckpointError(f"the privacy ledger {self.path} cannot be written ({bad.strerror}); free the disk") from None

    def epsilon(self, delta: float, accountant: str, *coming: Spend) -> float:
        """ε at δ of what was spent, and of what is `coming`."""
        return epsilon([*self.spent(), *coming], delta, accountant)

    def _line(self, number: int, line: bytes) -> Spend:
        try:
            said = read_object(_Turn, line, ValueError, "line")
            cost = Spend(noise=float(said.noise), rate=float(said.rate), steps=said.steps)
            good = 0 <= cost.noise < math.inf and 0 <= cost.rate <= 1 and cost.steps >= 0
        except (ValueError, OverflowError):
            good, cost = False, Spend(noise=0.0, rate=1.0, steps=1)
        if not good:
            raise CheckpointError(
                f"line {number} of the privacy ledger {self.path} cannot be read: what was spent is not known, so nothing more can be"
            )
        return cost

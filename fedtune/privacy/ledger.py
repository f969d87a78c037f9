"""The privacy ledger of a run: each client's privacy cost on disk, one file per client, one line per turn.

A line is flushed to disk before its turn begins, so a kill cannot lose a cost; a turn that is repeated after a kill is paid for again. An
incomplete last line costs nothing: its turn had not begun.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
    """The largest ε at δ of the clients with a ledger in `folder`; 0 without ledgers."""
    return max((Ledger(path).epsilon(delta, accountant) for path in sorted(folder.glob("*.jsonl"))), default=0.0)


@dataclass(frozen=True)
class _Turn(Spend):
    """One line: the cost of a turn. Lines of earlier versions have no unit."""

    round: int
    unit: str = ""


class Ledger:
    """One client's ledger.

    Args:
        path: Its file; the first line creates it and its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def spent(self) -> list[Spend]:
        """All costs so far, in order.

        Raises:
            CheckpointError: A line cannot be read. The spent budget is then unknown, and nothing more may be spent.
        """
        return [Spend(noise=turn.noise, rate=turn.rate, steps=turn.steps) for turn in self._turns()]

    def _turns(self) -> list[_Turn]:
        try:
            text = content_of(self.path)
        except FileNotFoundError:
            return []
        except OSError as bad:
            raise CheckpointError(f"the privacy ledger {self.path} cannot be read ({bad.strerror})") from None
        return [self._line(number, line) for number, line in enumerate(text.split(b"\n")[:-1], 1)]

    def units(self) -> set[str]:
        """The units of privacy of the costs so far, `record` or `user`; "" for lines of earlier versions.

        Raises:
            CheckpointError: A line cannot be read.
        """
        return {turn.unit for turn in self._turns()}

    def spend(self, round: int, cost: Spend, unit: str) -> None:
        """Add the cost of a turn, for a row (`record`) or for all rows of the client (`user`). It is on disk when this returns.

        Raises:
            CheckpointError: The ledger cannot be written.
        """
        line = json.dumps({"round": round, "unit": unit, **asdict(cost)}).encode() + b"\n"
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
            raise CheckpointError(f"the privacy ledger {self.path} cannot be written ({bad.strerror}); free disk space") from None

    def epsilon(self, delta: float, accountant: str, *planned: Spend) -> float:
        """ε at δ of the spent costs together with the `planned` ones."""
        return epsilon([*self.spent(), *planned], delta, accountant)

    def _line(self, number: int, line: bytes) -> _Turn:
        try:
            turn = read_object(_Turn, line, ValueError, "line")
            turn = replace(turn, noise=float(turn.noise), rate=float(turn.rate))
            good = 0 <= turn.noise < math.inf and 0 <= turn.rate <= 1 and turn.steps >= 0 and turn.unit in ("", "record", "user")
        except (ValueError, OverflowError):
            turn, good = None, False
        if turn is None or not good:
            raise CheckpointError(
                f"line {number} of the privacy ledger {self.path} cannot be read: the spent budget is unknown, so no more can be spent"
            )
        return turn

"""The fault matrix: `python -m tests.faults.matrix [--only CELL ...] [--out FILE] [--keep FOLDER]`; CELL is a name as printed, or a kind.

    python -m tests.faults.matrix --only "kill-client training" "cut 30"
    python -m tests.faults.matrix --only kill-server

Prints the outcome of every cell. The exit code is the number of bad ones.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.campaign import Campaign, Cell, Outcome, all_cells, kill_at_end
from tests.faults.forking import FORK, preload

SHORT = ("kill-client training", "kill-child uploading", "kill-superlink plan", "kill-both aggregating", "cut 1", "lie huge")


def select_cells(only: Sequence[str]) -> list[Cell]:
    """The cells of these names or kinds; all cells if `only` is empty."""
    cells = [c for c in all_cells() if not only or any(str(c) == o or c.kind == o for o in only)]
    if not cells:
        raise SystemExit(f"no such cell: {', '.join(only)}; there are {', '.join(map(str, all_cells()))}")
    return cells


def conduct(cells: Sequence[Cell], folder: Path) -> list[Outcome]:
    """Run the cells in one or more deployments: after a bad cell, the rest run in a new one."""
    outcomes: list[Outcome] = []
    quick = [c for c in cells if c.kind != "slow"]
    for part in (quick, [c for c in cells if c.kind == "slow"]):
        while part:
            with kill_at_end(Campaign(folder / f"{len(outcomes):02d}", part, report)) as campaign:
                outcomes += (done := campaign.run())
            part = part[len(done) :]
    return outcomes


def report(text: str) -> None:
    print(text, flush=True)


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [("cell", "outcome", "rounds", "s", "output"), ("---",) * 5]
    for o in outcomes:
        first, last = o.rounds
        rows.append((str(o.cell), "as expected" if o.good else "DEFECT", f"{first}–{last}", f"{o.seconds:.0f}", "; ".join(o.words)))
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table as Markdown")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the deployments in this folder")
    parser.add_argument("--fork", action="store_true", help="fork the processes instead of starting them: all modules are imported once")
    args = parser.parse_args()
    if args.fork:
        os.environ[FORK] = "1"
        preload()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as nowhere:
        outcomes = conduct(select_cells(args.only), args.keep or Path(nowhere))
    text = table(outcomes)
    report(f"\n{text}\n\n{len(outcomes)} cells in {time.monotonic() - began:.0f} s at load {os.getloadavg()[1]:.1f}")
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return sum(not o.good for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())

"""`fedtune compare`: compare finished runs."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Compare finished runs: mean and standard deviation over seeds, paired differences per seed, Markdown, CSV and a plot."
    compare = commands.add_parser("compare", help="compare finished runs", description=about)
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; the first one's settings are the baseline")
    compare.add_argument("--metric", metavar="NAME", help="metric to compare, such as loss (default: the runs' primary metric)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="folder for compare.md, compare.csv and compare.png")
    compare.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str | None:
    import importlib

    from fedtune.config.stored import read_config
    from fedtune.runs.report import compare

    if args.out:
        importlib.import_module("matplotlib")  # fails here if it is missing, before anything is printed
    found = compare.compare({path: read_config(path) for path in args.runs}, args.metric)
    compare.show(found)
    if args.out is None:
        return None
    compare.write(found, args.out)
    return str(args.out)

"""`fedtune status`: show the status of a run."""

import argparse
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Print the status of a run: its server, its clients, and the dropped clients with the reasons."
    status = commands.add_parser("status", help="show the status of a run", description=about)
    status.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run directory")
    status.add_argument("--control", metavar="127.0.0.1:PORT", help="ask the running server at this address instead")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    from fedtune.runs.status import ask, read_status, show

    if (args.run is None) == (args.control is None):
        raise ConfigError("give either a run directory or --control 127.0.0.1:PORT")
    return show(ask(args.control) if args.run is None else read_status(args.run), as_json=args.json)

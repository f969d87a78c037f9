"""`fedtune model`: list, roll back and remove the models that were delivered to this device."""

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import CheckpointError, ConfigError
from fedtune.storage.ids import shown

if TYPE_CHECKING:
    from fedtune.delivery.versions import Version, Versions


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "The versions of the model that `fedtune-client` has installed on this device. A running client serves a change at once."
    model = commands.add_parser("model", help="show and change a device's models", description=about)
    actions = model.add_subparsers(required=True, metavar="ACTION")
    for name, help_text, run in (
        ("list", "show the versions, newest first; * marks the current one", _list),
        ("rollback", "make the version current that was installed before the current one", _rollback),
        ("remove", "remove versions", _remove),
    ):
        action = actions.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        action.add_argument("--state", type=Path, required=True, metavar="DIR", help="the client's state folder")
        action.set_defaults(command=run)
        if name == "remove":
            which = action.add_mutually_exclusive_group(required=True)
            which.add_argument("name", nargs="?", metavar="NAME", help="the version to remove")
            which.add_argument("--others", action="store_true", help="remove all versions but the current one")
            which.add_argument("--all", action="store_true", help="remove all versions, the current one too")


def _open(state: Path) -> "Versions":
    from fedtune.delivery.versions import Versions

    if not state.is_dir():
        raise ConfigError(f"--state {state}: no such folder; give the folder that the log of `fedtune-client` names at its start")
    return Versions(state)


def _list(args: argparse.Namespace) -> None:
    from rich.console import Console

    from fedtune.runs.report.tables import print_table

    versions = _open(args.state)
    found = versions.names()
    try:
        current, why = versions.current(), None
    except CheckpointError as bad:
        current, why = None, bad
    if found:
        header = ["version", "run", "round", "chosen", "score", "size", "installed"]
        rows = [_row(version, version.name == current) for version in found]
        print_table(Console(color_system=None, highlight=False), header, rows, left=header[1:2] + header[3:], box=None)
    else:
        print("no model has been installed")
    for version in found:
        if version.flaw:
            print(f"fedtune: {version.flaw}", file=sys.stderr)
    if why is not None:  # last: the table can show which versions there are
        raise why


def _row(version: "Version", current: bool) -> list[str]:
    """The cells of one version; a record comes from a server, so its texts are made safe to print."""
    from fedtune.runs.report.summary import number, size

    name, record = f"{'*' if current else ' '} {version.name}", version.record
    if record is None:
        return [name, *6 * "–"]
    score = record.scores.get(record.chosen)
    scored = "–" if score is None else f"{shown(record.metric or '')} {number(score)}".strip()
    return [name, shown(record.run), str(record.round), record.chosen, scored, size(record.bytes), _date(record.installed)]


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return "–"


def _rollback(args: argparse.Namespace) -> str:
    return f"{_open(args.state).rollback()} is current"


def _remove(args: argparse.Namespace) -> str:
    versions = _open(args.state)
    if args.name is not None:
        versions.remove(args.name)
        return f"removed {args.name}"
    removed = versions.clear() if args.all else versions.prune(0)
    return f"removed {', '.join(removed)}" if removed else "there was nothing to remove"

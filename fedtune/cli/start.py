"""Where the programs start: each imports its command only then, so that a library that is not installed becomes one sentence."""

import importlib
import sys

from fedtune.errors import user_message


def simulate() -> int:
    """`python -m fedtune.sim`; returns the exit code, as the others do."""
    return _start("fedtune", "simulate")


def server() -> int:
    """`fedtune-server`."""
    return _start("fedtune-server", "server")


def client() -> int:
    """`fedtune-client`."""
    return _start("fedtune-client", "client")


def _start(program: str, command: str) -> int:
    try:
        main = importlib.import_module(f"fedtune.cli.{command}").main
    except ModuleNotFoundError as bad:
        print(f"{program}: {user_message(bad)}", file=sys.stderr)
        return 2
    return main()

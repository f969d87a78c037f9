"""The `fedtune` command: prepare a deployment, watch a run, and use its results.

    fedtune keys --out DIR --server-name HOST --clients a b c
    fedtune status RUN
    fedtune compare RUN RUN ...
    fedtune export RUN
    fedtune generate RUN/merged "turn on the light"
    fedtune chat RUN/merged
    fedtune serve RUN/merged
    fedtune model list --state DIR

Text and paths go to stdout. An error is one line on stderr, with exit code 2.
"""

import argparse
import sys

from fedtune.cli import bench, chat, compare, draft, export, generate, keys, model, serve, status
from fedtune.errors import user_message
from fedtune.version import __version__

_COMMANDS = (export, generate, chat, serve, bench, draft, keys, compare, status, model)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        # Each command imports what it needs, so that --help needs no torch
        if (output := args.command(args)) is not None:
            print(output, flush=True)
        return 0
    except BrokenPipeError:  # `fedtune ... | head`
        sys.stderr.close()
        return 141
    except Exception as bad:
        print(f"fedtune: {user_message(bad)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedtune", description="Set up, watch, export and try federated runs.")
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())

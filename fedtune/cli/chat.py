"""`fedtune chat`: talk to a model in the terminal, or answer the lines of a pipe."""

import argparse
from pathlib import Path
from typing import Any

from fedtune.cli._shared import add_sampling, sampling
from fedtune.errors import ConfigError


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Talk to a model in the terminal, or answer a request a line of a pipe. Ctrl-C ends an answer, Ctrl-D the talk."
    chat = commands.add_parser("chat", help="talk to a model", description=about)
    chat.add_argument("model", type=Path, metavar="MODEL", help="folder that `fedtune export` wrote, or any Hugging Face folder")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first, where its chat template has a place for it")
    chat.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the run's, else 256)")
    add_sampling(chat)
    chat.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> None:
    from fedtune.inference.chat import talk

    failed = talk(args.model, system=args.system, **sampling(args))
    if failed:
        raise ConfigError(f"{failed} of the requests could not be answered: their lines are empty")

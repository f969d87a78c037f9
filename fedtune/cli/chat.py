"""`fedtune chat`: chat with a model in the terminal, or answer requests from a pipe."""

import argparse
from typing import Any

from fedtune.cli._shared import add_model, add_sampling, model_of, sampling
from fedtune.errors import ConfigError


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Chat with a model in the terminal, or answer requests from a pipe, one per line. Ctrl-C stops an answer, Ctrl-D ends the chat."
    chat = commands.add_parser("chat", help="chat with a model", description=about)
    add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="system prompt, if the model's chat template supports one")
    chat.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the run's, else 256)")
    add_sampling(chat)
    chat.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> None:
    from fedtune.inference.chat import chat

    options = sampling(args)
    with model_of(args) as folder:
        failed = chat(folder, system=args.system, **options)
    if failed:
        raise ConfigError(f"{failed} of the requests could not be answered: their output lines are empty")

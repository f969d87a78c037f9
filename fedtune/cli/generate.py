"""`fedtune generate`: answer one request."""

import argparse
import sys
from typing import Any

from fedtune.cli._shared import add_model, add_sampling, model_of, sampling


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Print a model's answer to a request, or its continuation of a prompt."
    generate = commands.add_parser("generate", help="answer a request", description=about)
    add_model(generate)
    generate.add_argument("text", help="a request, which is put into the run's prompt template, or a complete prompt")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the run's, else 64)")
    add_sampling(generate)
    generate.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    from fedtune.inference.generate import StrippedWriter, generate_text

    options = sampling(args)
    with model_of(args) as folder:
        generate_text(folder, args.text, **options, write=StrippedWriter(sys.stdout).write)
    return ""  # the answer has been streamed already

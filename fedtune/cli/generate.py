"""`fedtune generate`: answer one request."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fedtune.cli._shared import add_sampling, sampling


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Print a model's answer to a request, or its continuation of a prompt."
    generate = commands.add_parser("generate", help="answer a request", description=about)
    generate.add_argument("model", type=Path, metavar="MODEL", help="folder that `fedtune export` wrote, or any Hugging Face folder")
    generate.add_argument("text", help="a request, which is put into the run's prompt template, or a complete prompt")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the run's, else 64)")
    add_sampling(generate)
    generate.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    from fedtune.inference.generate import StrippedWriter, generate_text

    generate_text(args.model, args.text, **sampling(args), write=StrippedWriter(sys.stdout).write)
    return ""  # the answer has been streamed already

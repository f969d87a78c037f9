"""Options that several commands share."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.config.bounds import require
from fedtune.errors import ConfigError

TRUST = "run the Python code in the model's folder; a run's files cannot allow this"


def add_model(command: argparse.ArgumentParser) -> None:
    """Add the model's folder and --client-state, for `model_of`."""
    command.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="folder that `fedtune export` wrote, or any Hugging Face folder; with --client-state: a run, its adapter folder, or a model"
        " that was delivered to the device",
    )
    command.add_argument(
        "--client-state",
        type=Path,
        metavar="DIR",
        help="run a client's personal model: DIR is the --state folder of fedtune-client, or RUN/clients/ID; the model is merged into a"
        " temporary folder at each start (`fedtune export RUN --client ID` keeps it)",
    )


@contextmanager
def model_of(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of the model to run: MODEL, or with --client-state a temporary one."""
    if args.client_state is None:
        yield args.model
        return
    from fedtune.delivery.personal import personal_model  # lazy: it loads torch

    with personal_model(args.model, args.client_state) as folder:
        yield folder


def add_sampling(command: argparse.ArgumentParser) -> None:
    """Add the sampling options of `generate` and `chat`."""
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0 is greedy (default: %(default)s)"
    )
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens (default: 0, all)")
    command.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the fewest most likely tokens of total probability P (default: 1, all)",
    )
    command.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="sample from tokens at least P times as likely as the best (default: 0)"
    )
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: make tokens of the text less likely (default: 1)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (default: %(default)s)")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    command.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], help="weight format in memory (default: as stored)")
    command.add_argument("--kv-budget", metavar="SIZE", help="memory for keys and values, such as 64MB (default: as the text needs)")
    command.add_argument("--draft", type=Path, metavar="FOLDER", help="small draft model for speculative decoding")
    command.add_argument(
        "--speculate",
        choices=["auto", "none", "lookup", "early-exit", "draft"],
        default="auto",
        help="source of draft tokens, used while it saves time; auto: the draft model if given, else earlier texts and predictions",
    )
    command.add_argument("--adapter", metavar="NAME|FOLDER", help="LoRA adapter to apply unmerged: one of the package's, or a folder")


def check_seed(seed: int) -> None:
    """Raises ConfigError if the seed is negative."""
    require("--seed", seed, ge=0)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options as keyword arguments of `generate_text` and `chat`."""
    check_seed(args.seed)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "kind", "kv_budget", "draft")
    return {n: getattr(args, n) for n in (*names, "speculate", "adapter")} | {"stop": tuple(args.stop)}


def host_and_port(option: str, text: str, example: str) -> tuple[str, int]:
    """Parse an option's HOST:PORT, where an IPv6 host may be in brackets. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{option} {text} is not an address: write HOST:PORT, such as {example}")
    return host.strip("[]"), int(port)

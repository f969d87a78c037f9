"""What several commands share: the options of sampling, and a sentence about foreign code."""

import argparse
from pathlib import Path
from typing import Any

from fedtune.config.bounds import require

TRUST = "run code that the model's folder brings along; no file of a run allows it"


def add_sampling(command: argparse.ArgumentParser) -> None:
    """What `generate` and `chat` share."""
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, all)")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that reach P (default: 1, all)")
    command.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from those P times as likely as the best (default: 0)")
    command.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: fewer tokens of the text (default: 1)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (default: %(default)s)")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    command.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], help="how weights are kept in memory (default: as stored)")
    command.add_argument("--kv-budget", metavar="SIZE", help="memory for keys and values, such as 64MB (default: what the text needs)")
    command.add_argument("--draft", type=Path, metavar="FOLDER", help="small model that guesses tokens for the large one to check")
    command.add_argument(
        "--speculate",
        choices=["auto", "none", "lookup", "early-exit", "draft"],
        default="auto",
        help="how tokens are guessed: auto, by the draft model where one is given, else by lookup in the text, and only while it pays",
    )
    command.add_argument("--adapter", metavar="NAME|FOLDER", help="LoRA adapter that stays apart: one of the package's, or a folder")


def check_seed(seed: int) -> None:
    """Raises ConfigError where the seed is below 0."""
    require("--seed", seed, ge=0)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `generate_text` and `talk` that the options of sampling give."""
    check_seed(args.seed)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "kind", "kv_budget", "draft")
    return {n: getattr(args, n) for n in (*names, "speculate", "adapter")} | {"stop": tuple(args.stop)}

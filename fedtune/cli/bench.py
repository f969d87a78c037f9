"""`fedtune bench`: measure how fast a model runs on this machine."""

import argparse
from pathlib import Path
from typing import Any

from fedtune.cli._shared import add_model, model_of


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Measure a model on this machine: prefill, decode, first token, memory, and the share of the memory bandwidth that it reaches."
    bench = commands.add_parser("bench", help="measure a model's speed on this machine", description=about)
    add_model(bench)
    bench.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], help="weight format in memory (default: as stored)")
    bench.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="tokens of the prompt (default: %(default)s)")
    bench.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens to generate (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="measured repeats, after a warm-up (default: %(default)s)")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, else this process's cores)")
    bench.add_argument("--speculate", action="store_true", help="also measure prompt lookup and early exit")
    bench.add_argument("--draft", type=Path, metavar="DIR", help="also measure this draft model")
    bench.add_argument("--text", type=Path, metavar="FILE", help="prompts for speculative decoding, one per line (default: sampled)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.json and bench.png")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    import importlib
    import json
    from dataclasses import asdict

    from rich.console import Console

    from fedtune.inference.bench import bench, table, use_threads, write
    from fedtune.inference.generate import check_folder, read_card

    if args.draft:
        check_folder(args.draft)
    use_threads(args.threads)
    if args.out:
        importlib.import_module("matplotlib")  # fails now if it is missing, not after minutes of measuring
    names = ("kind", "prompt_tokens", "new_tokens", "repeats", "speculate", "draft", "text")
    with model_of(args) as folder, Console(stderr=True).status("measuring") as line:
        read_card(folder)
        speeds = bench(folder, report=line.update, **{name: getattr(args, name) for name in names})
    if args.out:
        write(speeds, args.out)
    return json.dumps(asdict(speeds), indent=1) if args.json else table(speeds)

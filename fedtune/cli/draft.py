"""`fedtune draft`: distill a small draft model for speculative decoding."""

import argparse
import sys
from pathlib import Path
from typing import Any

from fedtune.cli._shared import TRUST, check_seed


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Distill a small draft model from a merged model, for speculative decoding (`fedtune generate --draft`)."
    draft = commands.add_parser("draft", help="distill a draft model for speculative decoding", description=about)
    draft.add_argument(
        "model", type=Path, metavar="MODEL|RUN", help="folder that `fedtune export` wrote, or a run, which is merged first if needed"
    )
    draft.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: draft, beside the model)")
    draft.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="one text per line, or .jsonl with text, messages, or prompt and response (default: sampled from the model)",
    )
    draft.add_argument("--layers", type=int, metavar="N", help="layers of the draft model (default: a quarter of the model's)")
    draft.add_argument("--steps", type=int, default=400, metavar="N", help="training steps (default: %(default)s)")
    draft.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts per step (default: %(default)s)")
    draft.add_argument("--length", type=int, default=128, metavar="N", help="longest text in tokens (default: %(default)s)")
    draft.add_argument("--lr", type=float, default=1e-3, metavar="RATE", help="peak learning rate (default: %(default)s)")
    share = "share of steps on texts that the draft model generates (default: %(default)s)"
    draft.add_argument("--on-policy", type=float, default=0.5, metavar="SHARE", help=share)
    draft.add_argument("--seed", type=int, default=0, metavar="S", help="seed of texts and sampling (default: %(default)s)")
    draft.add_argument("--trust-remote-code", action="store_true", help=TRUST)
    draft.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedtune.export.distill import Distillation, distill
    from fedtune.export.huggingface import export_hf

    check_seed(args.seed)
    settings = ("layers", "steps", "batch_size", "length", "lr", "on_policy", "seed")
    how = Distillation(**{name: getattr(args, name) for name in settings})
    model, out = args.model, args.out
    if (model / "config.yaml").is_file() and not (model / "config.json").is_file():
        model, out = model / "merged", out or model / "draft"
        if not model.is_dir():
            export_hf(args.model, model, trust_remote_code=args.trust_remote_code)
    out = out or model.parent / "draft"
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[nats]:.3f} nats"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)  # not on a terminal, rich would print an empty line
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as bar:
        row = bar.add_task("", total=how.steps, nats=float("nan"))
        figures = distill(
            model,
            out,
            text=args.text,
            how=how,
            trust_remote_code=args.trust_remote_code,
            report=lambda step, nats: bar.update(row, completed=step, nats=nats),
        )
    before, now = figures["acceptance_before"], figures["acceptance"]
    size = f"{100 * figures['parameters'] / figures['of']:.0f} % of the parameters"
    print(
        f"fedtune: {size}; the model accepts {100 * now:.0f} % of the draft tokens at temperature 1 ({100 * before:.0f} % before)",
        file=sys.stderr,
    )
    return str(out)

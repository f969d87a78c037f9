"""The `fedtune` command: what to do before a run on a network, while it goes, and with a run once it has ended.

    fedtune keys --out DIR --server-name HOST --clients a b c
    fedtune status RUN
    fedtune export RUN
    fedtune generate RUN/merged "turn on the light"

Text and paths go to stdout; what went wrong is one line on stderr, with exit code 2.
"""

import argparse
import sys
from pathlib import Path

from fedtune import __version__
from fedtune.errors import ConfigError, FedtuneError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        # Each command imports what it needs, so that --help needs no torch
        print(args.command(args), flush=True)
        return 0
    except FedtuneError as bad:
        print(f"fedtune: {bad}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `fedtune ... | head`
        sys.stderr.close()
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedtune", description="Set up, watch, export and try federated runs.")
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "Merge a run's adapter into its backbone and write the model."
    export = commands.add_parser("export", help="write the merged model of a run", description=about)
    export.add_argument("source", type=Path, metavar="RUN|ADAPTER", help="run directory, or PEFT adapter folder")
    export.add_argument("--to", choices=["hf"], default="hf", help="format: hf, a Hugging Face folder (default: %(default)s)")
    export.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: merged or requantized, in the given folder)")
    export.add_argument(
        "--requantize", action="store_true", help="quantise the merged model again, as the run's backbone was, and tell the error"
    )
    export.set_defaults(command=_export)

    about = "Print how a model goes on from a text."
    generate = commands.add_parser("generate", help="answer a request from a model", description=about)
    generate.add_argument("model", type=Path, metavar="MODEL", help="folder that `fedtune export` wrote, or any Hugging Face folder")
    generate.add_argument("text", help="a request, wrapped in the run's prompt template; or a whole prompt")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the run's, else 64)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (default: %(default)s)")
    generate.set_defaults(command=_generate)

    about = "Distil a small draft model from a merged one, for speculative decoding (`fedtune generate --draft`)."
    draft = commands.add_parser("draft", help="make a small model that drafts for the tuned one", description=about)
    draft.add_argument(
        "model", type=Path, metavar="MODEL|RUN", help="folder that `fedtune export` wrote, or a run (merged first where it is not)"
    )
    draft.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: draft, beside the model)")
    draft.add_argument(
        "--text", type=Path, metavar="FILE", help="a text a line, or .jsonl with text, or prompt and response (default: it writes them)"
    )
    draft.add_argument("--layers", type=int, metavar="N", help="layers of the draft (default: a quarter of the model's)")
    draft.add_argument("--steps", type=int, default=400, metavar="N", help="training steps (default: %(default)s)")
    draft.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts a step (default: %(default)s)")
    draft.add_argument("--length", type=int, default=128, metavar="N", help="longest text in tokens (default: %(default)s)")
    draft.add_argument("--lr", type=float, default=1e-3, metavar="RATE", help="peak learning rate (default: %(default)s)")
    share = "share of the steps on texts that the draft writes itself (default: %(default)s)"
    draft.add_argument("--on-policy", type=float, default=0.5, metavar="SHARE", help=share)
    draft.add_argument("--seed", type=int, default=0, metavar="S", help="of texts and sampling (default: %(default)s)")
    draft.set_defaults(command=_draft)

    about = "Make a CA, the server's certificate and a key for each client; or keys for further clients of such a folder."
    keys = commands.add_parser("keys", help="make certificates and client keys", description=about)
    keys.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, or with --add to add to")
    keys.add_argument("--server-name", metavar="HOST[,IP...]", help="names that clients reach the server by")
    keys.add_argument("--clients", nargs="+", metavar="NAME", help="name of each client")
    keys.add_argument("--add", nargs="+", metavar="NAME", help="further clients for an existing folder")
    keys.add_argument("--days", type=int, metavar="N", help="how long the certificates are good (default: 3650)")
    keys.set_defaults(command=_keys)

    about = "Print how a run stands: its server, its clients, what was dropped and why."
    status = commands.add_parser("status", help="show how a run stands", description=about)
    status.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run directory")
    status.add_argument("--control", metavar="127.0.0.1:PORT", help="ask the running server instead")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_status)
    return parser


def _export(args: argparse.Namespace) -> str:
    from fedtune.inference.export import beside, export_hf

    out = args.out or args.source / ("requantized" if args.requantize else "merged")
    export_hf(args.source, out, requantize=args.requantize)
    if said := beside(out):
        print(f"fedtune: {said}", file=sys.stderr)
    return str(out)


def _generate(args: argparse.Namespace) -> str:
    from fedtune.inference.generate import generate_text

    text = generate_text(args.model, args.text, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    return text.strip()


def _draft(args: argparse.Namespace) -> str:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedtune.inference.distil import Distillation, distil
    from fedtune.inference.export import export_hf

    settings = ("layers", "steps", "batch_size", "length", "lr", "on_policy", "seed")
    how = Distillation(**{name: getattr(args, name) for name in settings})
    model, out = args.model, args.out
    if (model / "config.yaml").is_file() and not (model / "config.json").is_file():
        model, out = model / "merged", out or model / "draft"
        if not model.is_dir():
            export_hf(args.model, model)
    out = out or model.parent / "draft"
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[nats]:.3f} nats"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("", total=how.steps, nats=float("nan"))
        figures = distil(model, out, text=args.text, how=how, tell=lambda step, nats: bar.update(row, completed=step, nats=nats))
    before, now = figures["acceptance_before"], figures["acceptance"]
    told = f"{100 * figures['parameters'] / figures['of']:.0f} % of the parameters; the model accepts {100 * now:.0f} % of its tokens"
    print(f"fedtune: {told} at temperature 1 ({100 * before:.0f} % before)", file=sys.stderr)
    return str(out)


def _keys(args: argparse.Namespace) -> str:
    from fedtune.keys import DAYS, add_clients, make_keys

    if args.add:
        if extra := [f for f in ("server_name", "clients", "days") if getattr(args, f) is not None]:
            raise ConfigError(f"--add makes client keys for a folder that is there: leave out --{extra[0].replace('_', '-')}")
        return add_clients(args.out, args.add)
    if args.server_name is None or not args.clients:
        raise ConfigError("a new folder of keys needs --server-name HOST and --clients NAME ...; a further client needs --add NAME")
    hosts = [host.strip() for host in args.server_name.split(",")]
    return make_keys(args.out, hosts, args.clients, days=DAYS if args.days is None else args.days)


def _status(args: argparse.Namespace) -> str:
    from fedtune.status import ask, read_status, show

    if (args.run is None) == (args.control is None):
        raise ConfigError("give either a run directory or --control 127.0.0.1:PORT")
    return show(ask(args.control) if args.run is None else read_status(args.run), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())

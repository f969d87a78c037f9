"""The `fedtune` command: what to do before a run on a network, while it goes, and with a run once it has ended.

    fedtune keys --out DIR --server-name HOST --clients a b c
    fedtune status RUN
    fedtune compare RUN RUN ...
    fedtune export RUN
    fedtune generate RUN/merged "turn on the light"
    fedtune chat RUN/merged
    fedtune serve RUN/merged

Text and paths go to stdout; what went wrong is one line on stderr, with exit code 2.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.bounds import require
from fedtune.errors import ConfigError, sentence

_TRUST = "run code that the model's folder brings along; no file of a run allows it"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        # Each command imports what it needs, so that --help needs no torch
        if (said := args.command(args)) is not None:
            print(said, flush=True)
        return 0
    except BrokenPipeError:  # `fedtune ... | head`
        sys.stderr.close()
        return 141
    except Exception as bad:
        print(f"fedtune: {sentence(bad)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedtune", description="Set up, watch, export and try federated runs.")
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "Merge a run's adapter into its backbone and write the model: for other programs, for the engine on a device, or for llama.cpp."
    export = commands.add_parser("export", help="write the merged model of a run, or a model for a device", description=about)
    export.add_argument(
        "source",
        type=Path,
        metavar="RUN|RUN/clients/ID|ADAPTER|MODEL",
        help="run directory, a client's folder in it (its personal model), PEFT adapter folder, or whole model",
    )
    export.add_argument(
        "--to",
        choices=["hf", "edge", "gguf"],
        default="hf",
        help="format: hf, a Hugging Face folder; edge, a package for fedtune's engine; gguf, a file for llama.cpp (default: %(default)s)",
    )
    export.add_argument(
        "--out", type=Path, metavar="PATH", help="folder or file to write (default: in the given folder, named by its format)"
    )
    export.add_argument(
        "--requantize", action="store_true", help="hf: quantise the merged model again, as the run's backbone was, and tell the error"
    )
    export.add_argument("--trust-remote-code", action="store_true", help=f"hf: {_TRUST}")
    export.add_argument("--quantize", choices=["int8", "int4"], help="edge: keep weights as int8 or int4 (default: as the checkpoint does)")
    export.add_argument("--method", choices=["rtn", "gptq", "awq", "smoothquant"], help="edge: how to quantise (default: rtn)")
    export.add_argument(
        "--calibrate", type=Path, metavar="DATA", help="edge: text for gptq, awq, smoothquant and the perplexity: a RUN, .txt or .jsonl"
    )
    export.add_argument("--separate", action="store_true", help="edge: keep a LoRA adapter apart, to be chosen for each request")
    export.add_argument("--gguf-type", choices=["f16", "q8_0", "q4_0"], help="gguf: how weights are kept (default: f16)")
    export.set_defaults(command=_export)

    about = "Print how a model goes on from a text."
    generate = commands.add_parser("generate", help="answer a request from a model", description=about)
    generate.add_argument("model", type=Path, metavar="MODEL", help="folder that `fedtune export` wrote, or any Hugging Face folder")
    generate.add_argument("text", help="a request, wrapped in the run's prompt template; or a whole prompt")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the run's, else 64)")
    _sampling_options(generate)
    generate.set_defaults(command=_generate)

    about = "Talk to a model in the terminal, or answer a request a line of a pipe. Ctrl-C ends an answer, Ctrl-D the talk."
    chat = commands.add_parser("chat", help="talk to a model", description=about)
    chat.add_argument("model", type=Path, metavar="MODEL", help="folder that `fedtune export` wrote, or any Hugging Face folder")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first, where its chat template has a place for it")
    chat.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens (default: the run's, else 256)")
    _sampling_options(chat)
    chat.set_defaults(command=_chat)

    about = "Answer requests over HTTP in OpenAI's protocol, and show a page to try the model. Ctrl-C ends it, once answers have ended."
    serve = commands.add_parser("serve", help="answer requests over HTTP", description=about)
    serve.add_argument("model", type=Path, metavar="MODEL", help="folder that `fedtune export` wrote, or any Hugging Face folder")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    serve.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys that may call, one a line (default: variable FEDTUNE_API_KEY, else anybody)"
    )
    serve.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], help="how weights are kept in memory (default: as stored)")
    serve.add_argument("--kv-budget", metavar="SIZE", help="memory for keys and values, such as 64MB (default: at most 512MiB)")
    serve.add_argument("--max-concurrent", type=int, metavar="N", help="requests under way at once (default: 16)")
    serve.add_argument("--queue", type=int, default=64, metavar="N", help="further requests that may wait (default: %(default)s)")
    serve.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="largest request (default: %(default)s)")
    serve.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="longest answer in tokens (default: %(default)s)")
    serve.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds that a request may take (default: %(default)s)")
    serve.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds for answers to end on a stop (default: %(default)s)")
    serve.add_argument("--adapters", nargs="+", default=[], metavar="NAME=FOLDER", help="LoRA adapters, chosen by a request's model")
    serve.set_defaults(command=_serve)

    about = "Measure a model on this machine: prefill, decode, first token, memory, and how near that is to what the memory can give."
    bench = commands.add_parser("bench", help="measure how fast a model is here", description=about)
    bench.add_argument("model", type=Path, metavar="MODEL", help="edge package or Hugging Face folder")
    bench.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], help="how weights are kept (default: as the model is stored)")
    bench.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="tokens of the prompt (default: %(default)s)")
    bench.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens after it (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="after one that warms up (default: %(default)s)")
    bench.add_argument("--threads", type=int, metavar="N", help="default: torch's own")
    bench.add_argument("--speculate", action="store_true", help="measure prompt lookup and early exit too")
    bench.add_argument("--draft", type=Path, metavar="DIR", help="measure this draft model too")
    bench.add_argument("--text", type=Path, metavar="FILE", help="lines that begin the answers of speculation (default: it samples some)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="write bench.json and bench.png there")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.set_defaults(command=_bench)

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
    draft.add_argument("--trust-remote-code", action="store_true", help=_TRUST)
    draft.set_defaults(command=_draft)

    about = "Make a CA, the server's certificate and a key for each client; or change such a folder: one of --add, --rotate, --remove, ..."
    keys = commands.add_parser("keys", help="make certificates and client keys", description=about)
    keys.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, or to change")
    keys.add_argument("--server-name", metavar="HOST[,IP...]", help="names that clients reach the server by")
    keys.add_argument("--clients", nargs="+", metavar="NAME", help="name of each client")
    change = keys.add_mutually_exclusive_group()
    change.add_argument("--add", nargs="+", metavar="NAME", help="further clients for an existing folder")
    change.add_argument("--rotate", nargs="+", metavar="NAME", help="new keys for clients; their old ones are refused")
    change.add_argument("--remove", nargs="+", metavar="NAME", help="clients that may not take part any more")
    change.add_argument("--renew-server", action="store_true", help="a new certificate of the server, signed with DIR/ca.key")
    keys.add_argument("--ca-key", type=Path, metavar="FILE", help="where the CA's key is, if it is not DIR/ca.key (with --renew-server)")
    keys.add_argument("--days", type=int, metavar="N", help="how long the server's certificate is good (default: 3650)")
    keys.set_defaults(command=_keys)

    about = "Put finished runs side by side: mean and standard deviation over seeds, differences seed by seed, Markdown, CSV and a plot."
    compare = commands.add_parser("compare", help="compare finished runs", description=about)
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories; the first one's setting is compared with")
    compare.add_argument("--metric", metavar="NAME", help="what to judge by, such as loss (default: the metric that the runs report)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="write compare.md, compare.csv and compare.png there")
    compare.set_defaults(command=_compare)

    about = "Print how a run stands: its server, its clients, what was dropped and why."
    status = commands.add_parser("status", help="show how a run stands", description=about)
    status.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run directory")
    status.add_argument("--control", metavar="127.0.0.1:PORT", help="ask the running server instead")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(command=_status)
    return parser


def _sampling_options(command: argparse.ArgumentParser) -> None:
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


def _check_seed(seed: int) -> None:
    require("--seed", seed, ge=0)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    _check_seed(args.seed)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "kind", "kv_budget", "draft")
    return {n: getattr(args, n) for n in (*names, "speculate", "adapter")} | {"stop": tuple(args.stop)}


def _export(args: argparse.Namespace) -> str:
    flags = {"hf": ["requantize", "trust_remote_code"], "edge": ["quantize", "method", "calibrate", "separate"], "gguf": ["gguf_type"]}
    of = {name: to for to, names in flags.items() for name in names}
    if odd := [name for name, to in of.items() if getattr(args, name) and to != args.to]:
        raise ConfigError(f"--{odd[0].replace('_', '-')} goes with --to {of[odd[0]]}, not with --to {args.to}: leave it out")
    if args.method and not args.quantize:
        raise ConfigError(f"--method {args.method} needs --quantize int8 or int4")
    if args.method in ("gptq", "awq", "smoothquant") and not args.calibrate:
        raise ConfigError(f"--method {args.method} needs text: give --calibrate RUN, a .txt file or rows of JSON")
    if args.to == "gguf":
        from fedtune.inference.gguf import describe_gguf, export_gguf

        kind = args.gguf_type or "f16"
        out = args.out or args.source / f"model-{kind}.gguf"
        export_gguf(args.source, out, kind=kind)
        said = describe_gguf(out)
    elif args.to == "edge":
        from fedtune.inference.edge import export_edge, told

        out = args.out or args.source / (f"edge-{args.quantize}" if args.quantize else "edge")
        export_edge(args.source, out, quantize=args.quantize, method=args.method, calibrate=args.calibrate, separate=args.separate)
        said = told(out)
    else:
        from fedtune.inference.export import beside, export_hf

        out = args.out or args.source / ("requantized" if args.requantize else "merged")
        export_hf(args.source, out, requantize=args.requantize, trust_remote_code=args.trust_remote_code)
        said = beside(out)
    if said:
        print(f"fedtune: {said}", file=sys.stderr)
    return str(out)


def _generate(args: argparse.Namespace) -> str:
    from fedtune.inference.generate import Stripped, generate_text

    generate_text(args.model, args.text, **_sampling(args), write=Stripped(sys.stdout).write)
    return ""  # it is out already, as it came


def _bench(args: argparse.Namespace) -> str:
    import json
    from dataclasses import asdict

    from rich.console import Console

    from fedtune.inference.bench import bench, table, threads, write
    from fedtune.inference.generate import check_folder, read_card

    read_card(args.model)
    if args.draft:
        check_folder(args.draft)
    threads(args.threads)
    names = ("kind", "prompt_tokens", "new_tokens", "repeats", "speculate", "draft", "text")
    with Console(stderr=True).status("measuring") as line:
        speeds = bench(args.model, tell=line.update, **{name: getattr(args, name) for name in names})
    if args.out:
        write(speeds, args.out)
    return json.dumps(asdict(speeds), indent=1) if args.json else table(speeds)


def _draft(args: argparse.Namespace) -> str:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from fedtune.inference.distil import Distillation, distil
    from fedtune.inference.export import export_hf

    _check_seed(args.seed)
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
    console = Console(stderr=True)  # where nobody looks, rich would leave an empty line
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as bar:
        row = bar.add_task("", total=how.steps, nats=float("nan"))
        figures = distil(
            model,
            out,
            text=args.text,
            how=how,
            trust_remote_code=args.trust_remote_code,
            tell=lambda step, nats: bar.update(row, completed=step, nats=nats),
        )
    before, now = figures["acceptance_before"], figures["acceptance"]
    told = f"{100 * figures['parameters'] / figures['of']:.0f} % of the parameters; the model accepts {100 * now:.0f} % of its tokens"
    print(f"fedtune: {told} at temperature 1 ({100 * before:.0f} % before)", file=sys.stderr)
    return str(out)


def _serve(args: argparse.Namespace) -> str:
    from fedtune.inference.engine.caches.budget import parse_size
    from fedtune.inference.serve.limits import ApiKeys, Limits
    from fedtune.inference.serve.start import named, serve

    serve(
        args.model,
        host=args.host,
        port=args.port,
        keys=ApiKeys.find(args.api_key_file),
        limits=Limits(max_body=args.max_body, max_tokens=args.max_tokens, timeout=args.timeout, grace=args.grace),
        kind=args.kind,
        kv_budget=None if args.kv_budget is None else parse_size(args.kv_budget),
        max_concurrent=args.max_concurrent,
        queue=args.queue,
        adapters=named(args.adapters),
    )
    return "stopped"


def _chat(args: argparse.Namespace) -> None:
    from fedtune.inference.chat import talk

    failed = talk(args.model, system=args.system, **_sampling(args))
    if failed:
        raise ConfigError(f"{failed} of the requests could not be answered: their lines are empty")


def _keys(args: argparse.Namespace) -> str:
    from fedtune import keys

    changes = {"add": keys.add_clients, "rotate": keys.rotate_clients, "remove": keys.remove_clients}
    asked = next((name for name in changes if getattr(args, name)), "renew-server" if args.renew_server else "")
    useless = {"": ["ca_key"], "renew-server": ["clients"]}.get(asked, ["server_name", "clients", "days", "ca_key"])
    if extra := [f for f in useless if getattr(args, f) is not None]:
        what = f"--{asked} changes a folder that is there" if asked else "a new folder gets a CA of its own"
        raise ConfigError(f"{what}: leave out --{extra[0].replace('_', '-')}")
    if asked in changes:
        return changes[asked](args.out, getattr(args, asked))
    days = keys.DAYS if args.days is None else args.days
    hosts = [] if args.server_name is None else [host.strip() for host in args.server_name.split(",")]
    if asked:
        return keys.renew_server(args.out, hosts, days=days, ca_key=args.ca_key)
    if args.server_name is None or not args.clients:
        raise ConfigError(
            "a new folder of keys needs --server-name HOST and --clients NAME ...; --add, --rotate, --remove and --renew-server change one"
        )
    return keys.make_keys(args.out, hosts, args.clients, days=days)


def _compare(args: argparse.Namespace) -> str | None:
    from fedtune.report import compare
    from fedtune.run_config import read_config

    found = compare.compare({path: read_config(path) for path in args.runs}, args.metric)
    compare.show(found)
    if args.out is None:
        return None
    compare.write(found, args.out)
    return str(args.out)


def _status(args: argparse.Namespace) -> str:
    from fedtune.status import ask, read_status, show

    if (args.run is None) == (args.control is None):
        raise ConfigError("give either a run directory or --control 127.0.0.1:PORT")
    return show(ask(args.control) if args.run is None else read_status(args.run), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())

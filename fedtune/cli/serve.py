"""`fedtune serve`: answer requests over HTTP in OpenAI's protocol."""

import argparse
from pathlib import Path
from typing import Any

from fedtune.cli._shared import add_model, model_of


def add(commands: Any) -> None:
    """Add the command to the parser of `fedtune`."""
    about = "Answer requests over HTTP in OpenAI's protocol, with a page to try the model. Ctrl-C stops it after the running answers."
    serve = commands.add_parser("serve", help="answer requests over HTTP", description=about)
    add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free port (default: %(default)s)")
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="accepted API keys, one per line (default: variable FEDTUNE_API_KEY, else no key is needed)",
    )
    serve.add_argument("--kind", choices=["fp32", "bf16", "int8", "int4"], help="weight format in memory (default: as stored)")
    serve.add_argument("--kv-budget", metavar="SIZE", help="memory for keys and values, such as 64MB (default: at most 512MiB)")
    serve.add_argument("--max-concurrent", type=int, metavar="N", help="requests processed at once (default: 16)")
    serve.add_argument("--queue", type=int, default=64, metavar="N", help="further requests that may wait (default: %(default)s)")
    serve.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="largest request body (default: %(default)s)")
    serve.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="longest answer in tokens (default: %(default)s)")
    serve.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds that a request may take (default: %(default)s)")
    serve.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds for running answers to end after a stop (default: %(default)s)"
    )
    serve.add_argument("--adapters", nargs="+", default=[], metavar="NAME=FOLDER", help="LoRA adapters, selected by a request's `model`")
    serve.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> str:
    from fedtune.inference.engine.caches.budget import parse_size
    from fedtune.inference.serve.limits import ApiKeys, Limits
    from fedtune.inference.serve.start import parse_adapters, serve

    with model_of(args) as folder:
        serve(
            folder,
            host=args.host,
            port=args.port,
            keys=ApiKeys.find(args.api_key_file),
            limits=Limits(max_body=args.max_body, max_tokens=args.max_tokens, timeout=args.timeout, grace=args.grace),
            kind=args.kind,
            kv_budget=None if args.kv_budget is None else parse_size(args.kv_budget),
            max_concurrent=args.max_concurrent,
            queue=args.queue,
            adapters=parse_adapters(args.adapters),
        )
    return "stopped"

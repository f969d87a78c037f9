"""The device's door: `fedtune-client --server host:8080`, which takes part in whatever experiment that server runs.

The process that holds the connection has no torch in it; a child of its has, keeps the model loaded between rounds, and may die without
taking the node down.
"""

import argparse
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.app import Message

from fedtune.config.bounds import require
from fedtune.errors import ConfigError, sentence
from fedtune.version import __version__

_log = logging.getLogger("fedtune.cli.client")


def main(argv: Sequence[str] | None = None) -> int:
    """Take part until stopped; returns the exit code: 2 is a refusal in one sentence, 130 stopped."""
    args = _parser().parse_args(argv)
    try:
        return _main(args)
    except Exception as bad:
        print(f"fedtune-client: {sentence(bad)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedtune-client", description="Take part in a server's experiments with this device's own data, until stopped."
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="the coordinator's address")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="this device's rows: a file, a folder or a glob (default: its part of the built-in demo); a server cannot name others",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the backbone's folder on this device (default: the built-in one, or the hub's by the server's name); servers name no folder",
    )
    parser.add_argument(
        "--device",
        metavar="PROFILE",
        help="what this device can do: auto measures it, a name is one of the scenario's device classes, FILE.yaml holds the keys of one"
        " (default: take every plan as it is)",
    )
    parser.add_argument("--client-id", metavar="ID", help="this client's name (default: the folder of --key, or the host's name)")
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="ca.pem of the server (default: the system's CAs)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="this client's private key, as `fedtune keys` made it")
    parser.add_argument("--insecure", action="store_true", help="plain HTTP and no key: for trials on one machine")
    parser.add_argument(
        "--min-privacy",
        choices=["record", "user"],
        help="least privacy that this device applies to what it sends, whatever the server says: record hides each of its rows, user all of"
        " them; it then draws its noise itself, evaluates nothing, and refuses other turns (default: as the server says)",
    )
    parser.add_argument(
        "--max-epsilon",
        type=float,
        metavar="E",
        help="most that this device gives up over all turns of all runs, as ε at --delta; further turns are refused. Needs --min-privacy",
    )
    parser.add_argument("--delta", type=float, default=1e-5, metavar="D", help="δ of --max-epsilon (default: %(default)g)")
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="what is kept between turns and restarts (default: ~/.local/state/fedtune/ID)"
    )
    parser.add_argument(
        "--max-retries", type=int, metavar="N", help="give up after so many failed tries of one call (default: never give up)"
    )
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    return parser


def _main(args: argparse.Namespace) -> int:
    from fedtune.network.executor import Executor
    from fedtune.network.keys import check_private
    from fedtune.network.logs import logging_to
    from fedtune.network.node import Node

    require("--max-retries", args.max_retries, ge=0)
    if args.insecure and (args.key or args.root_certificates):
        raise ConfigError("--insecure speaks without TLS and keys: leave out --key and --root-certificates, or --insecure")
    if not args.insecure and args.key is None:
        raise ConfigError("--key says who this client is: `fedtune keys` makes one; --insecure does without, for trials on one machine")
    if args.key is not None:
        check_private(args.key)
    if args.data is not None:
        from fedtune.data.local import has_files

        if not has_files(args.data):
            raise ConfigError(f"--data {args.data} is no file, folder or glob that means any")
    if args.max_epsilon is not None and args.min_privacy is None:
        raise ConfigError("--max-epsilon counts what private turns cost: say with --min-privacy record or user that others are refused")
    require("--max-epsilon", args.max_epsilon, gt=0)
    require("--delta", args.delta, gt=0, lt=1)
    if args.model is not None and not args.model.expanduser().is_dir():
        raise ConfigError(f"--model {args.model}: there is no such folder")
    client = _client_id(args)
    state = (args.state or Path.home() / ".local/state/fedtune" / client).expanduser().resolve()
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as bad:
        raise ConfigError(f"cannot keep anything in {state}: {bad.strerror}; give another --state") from None
    settings: dict[str, Any] = {
        "client": client,
        "state": str(state),
        "data": None if args.data is None else os.path.abspath(Path(args.data).expanduser()),
        "model": None if args.model is None else os.path.abspath(args.model.expanduser()),
        "min_privacy": args.min_privacy,
        "max_epsilon": args.max_epsilon,
        "delta": args.delta,
        "device": _device(args.device),
    }
    executor = Executor(settings, state / "logs" / "worker.log")
    node = Node(
        server=args.server,
        root_certificates=args.root_certificates,
        key=args.key if not args.insecure else state / "node.key",
        insecure=args.insecure,
        answer=lambda message, node: _recorded(message, lambda: executor.answer(message, node)),
        max_retries=args.max_retries,
        told=_tell,
    )

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopping.is_set():  # asked twice: do not wait for the turn at hand
            executor.stop()
        stopping.set()
        node.stop()
        threading.Thread(target=executor.stop, daemon=True).start()

    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with logging_to(state / "logs" / "client.jsonl"):
        if args.insecure:
            _tell("WARNING: --insecure: no TLS and no key; whoever sits between can read and change what is sent")
        _tell(f"client {client}: connecting to {args.server}; what is kept lies in {state}")
        try:
            node.serve()
        finally:
            executor.stop()
    return 130 if stopping.is_set() else 0


def _recorded(message: Message, answer: Callable[[], Message]) -> Message:
    """Answer a message, and put into the log what was asked and what came of it."""
    from fedtune.network.diary import describe

    began = time.monotonic()
    reply = answer()
    sentence, fields = describe(message, reply, time.monotonic() - began)
    _tell(sentence, **fields)
    return reply


def _client_id(args: argparse.Namespace) -> str:
    client = args.client_id or (args.key.resolve().parent.name if args.key else socket.gethostname())
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", client):
        raise ConfigError(f"the client's name is '{client}': letters, digits, dots, dashes and underscores make one; give --client-id")
    return client


def _device(asked: str | None) -> str | None:
    """`auto`, a name, or the absolute path of a file."""
    if asked is None or asked == "auto" or not asked.endswith((".yaml", ".yml")):
        return asked
    if not Path(asked).expanduser().is_file():
        raise ConfigError(f"--device {asked}: there is no such file")
    return os.path.abspath(Path(asked).expanduser())


def _tell(text: str, **fields: Any) -> None:
    _log.info(text, extra=fields)
    print(f"fedtune-client: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

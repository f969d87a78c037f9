"""The client command: `fedtune-client --server host:8080` takes part in the server's experiments.

The process with the connection does not import torch. A child process does: it keeps the model loaded between rounds, and its crash does
not stop the node.
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

from flwr.app import Message, RecordDict

from fedtune.cli._shared import host_and_port
from fedtune.config.bounds import require
from fedtune.contracts.delivery import END
from fedtune.contracts.hello import REJECTED
from fedtune.errors import ConfigError, user_message
from fedtune.version import __version__

_log = logging.getLogger("fedtune.cli.client")


def main(argv: Sequence[str] | None = None) -> int:
    """Take part until stopped. Returns the exit code: 2 for an error, 130 if stopped."""
    args = _parser().parse_args(argv)
    try:
        return _main(args)
    except Exception as bad:
        print(f"fedtune-client: {user_message(bad)}", file=sys.stderr)
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
        help="this device's rows: a file, folder or glob (default: its part of the built-in demo); the server cannot choose files",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the backbone's folder on this device (default: the built-in one, or the server's hub model); the server cannot choose one",
    )
    parser.add_argument(
        "--device",
        metavar="PROFILE",
        help="the device's capabilities: auto measures them, NAME is a device class of the scenario, FILE.yaml has a class's keys"
        " (default: accept every plan unchanged)",
    )
    parser.add_argument("--client-id", metavar="ID", help="this client's name (default: the folder of --key, or the host name)")
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="ca.pem of the server (default: the system's CAs)")
    parser.add_argument("--key", type=Path, metavar="FILE", help="this client's private key from `fedtune keys`")
    parser.add_argument(
        "--signing-pub",
        type=Path,
        metavar="FILE",
        help="signing.pub of `fedtune keys`: install the server's models that its private half has signed (default: install none)",
    )
    parser.add_argument(
        "--package",
        choices=["auto", "int8", "int4", "stored"],
        default="auto",
        help="weight format of installed models; stored: as in the backbone; auto: int8, or int4 if int8 would take more than a quarter of"
        " the memory (default: auto)",
    )
    parser.add_argument(
        "--serve",
        metavar="HOST:PORT",
        help="answer requests in OpenAI's protocol from the newest installed model, also while training; needs --signing-pub or --insecure",
    )
    parser.add_argument(
        "--exit-when-done", action="store_true", help="stop, and no longer serve, when the server says that the run has ended"
    )
    parser.add_argument("--insecure", action="store_true", help="plain HTTP, no key and unsigned models: for trials on one machine")
    parser.add_argument(
        "--min-privacy",
        choices=["record", "user"],
        help="minimum privacy of all updates, whatever the server asks: record protects each row, user all rows together; the device then"
        " draws its own noise, evaluates nothing, and refuses other turns (default: as the server asks)",
    )
    parser.add_argument(
        "--max-epsilon",
        type=float,
        metavar="E",
        help="ε budget of this device over all turns of all runs, at --delta; further turns are refused; needs --min-privacy",
    )
    parser.add_argument("--delta", type=float, default=1e-5, metavar="D", help="δ of --max-epsilon (default: %(default)g)")
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="folder for state kept between turns and restarts (default: ~/.local/state/fedtune/ID)"
    )
    parser.add_argument("--max-retries", type=int, metavar="N", help="exit after N failed attempts of one call (default: retry forever)")
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    return parser


def _main(args: argparse.Namespace) -> int:
    from fedtune.network.executor import Executor
    from fedtune.network.keys import check_private_key
    from fedtune.network.logs import logging_to
    from fedtune.network.node import Node

    require("--max-retries", args.max_retries, ge=0)
    if args.insecure and (args.key or args.root_certificates):
        raise ConfigError("--insecure uses neither TLS nor keys: leave out --key and --root-certificates, or --insecure")
    if not args.insecure and args.key is None:
        raise ConfigError("--key is missing: create a key with `fedtune keys`, or use --insecure for trials on one machine")
    if args.key is not None:
        check_private_key(args.key)
    if args.data is not None:
        from fedtune.data.local import has_files

        if not has_files(args.data):
            raise ConfigError(f"--data {args.data}: no such file or folder, and no file matches it as a glob")
    if args.max_epsilon is not None and args.min_privacy is None:
        raise ConfigError("--max-epsilon limits the cost of private turns: add --min-privacy record or user, which refuses other turns")
    require("--max-epsilon", args.max_epsilon, gt=0)
    require("--delta", args.delta, gt=0, lt=1)
    if args.signing_pub is not None:
        from fedtune.delivery.signing import Verifier

        if args.insecure:
            raise ConfigError("--insecure installs models without a signature: leave out --signing-pub, or --insecure")
        Verifier(args.signing_pub)
    if args.serve is not None and not (args.insecure or args.signing_pub):
        raise ConfigError("--serve answers from models that the server delivers: add --signing-pub signing.pub, which `fedtune keys` makes")
    if args.model is not None and not args.model.expanduser().is_dir():
        raise ConfigError(f"--model {args.model}: no such folder")
    client = _client_id(args)
    state = (args.state or Path.home() / ".local/state/fedtune" / client).expanduser().resolve()
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as bad:
        raise ConfigError(f"cannot create the state folder {state}: {bad.strerror}; give another --state") from None
    settings: dict[str, Any] = {
        "client": client,
        "state": str(state),
        "data": None if args.data is None else os.path.abspath(Path(args.data).expanduser()),
        "model": None if args.model is None else os.path.abspath(args.model.expanduser()),
        "min_privacy": args.min_privacy,
        "max_epsilon": args.max_epsilon,
        "delta": args.delta,
        "device": _device(args.device),
        "signing_pub": None if args.signing_pub is None else os.path.abspath(args.signing_pub.expanduser()),
        "unsigned": args.insecure,
        "package": args.package,
    }
    executor = Executor(settings, state / "logs" / "worker.log")
    node = Node(
        server=args.server,
        root_certificates=args.root_certificates,
        key=args.key if not args.insecure else state / "node.key",
        insecure=args.insecure,
        answer=lambda message, node: _recorded(message, lambda: _news_reply(message) or executor.answer(message, node)),
        max_retries=args.max_retries,
        report=_report,
        ends=lambda message: args.exit_when_done and message.metadata.message_type == END,
    )
    server = None
    if args.serve is not None:
        from fedtune.delivery.serving import DeviceServer

        server = DeviceServer(state, *host_and_port("--serve", args.serve, "127.0.0.1:8000"), _report)

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopping.is_set():  # second signal: do not wait for the current turn
            executor.stop()
        stopping.set()
        node.stop()
        threading.Thread(target=executor.stop, daemon=True).start()

    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with logging_to(state / "logs" / "client.jsonl"):
        if args.insecure:
            _report(
                "WARNING: --insecure: no TLS, no key and no signature; anyone on the network path can read and change the messages and the"
                " models"
            )
        elif args.signing_pub is None:
            _report("no --signing-pub: this device will not install the run's model")
        _report(f"client {client}: connecting to {args.server}; state folder {state}")
        try:
            if server is not None:
                server.start()
            node.serve()
            if not stopping.is_set():
                _report("stops, because the run has ended (--exit-when-done)")
        finally:
            executor.stop()
            if server is not None:
                server.stop()
    return 130 if stopping.is_set() else 0


def _recorded(message: Message, answer: Callable[[], Message]) -> Message:
    """Answer a message, and log the message and the outcome."""
    from fedtune.network.turn_log import describe

    began = time.monotonic()
    reply = answer()
    text, fields = describe(message, reply, time.monotonic() - began)
    if text:
        _report(text, **fields)
    return reply


def _news_reply(message: Message) -> Message | None:
    """The reply to a message that only informs the client, such as of the run's end, and needs no worker; None for other messages."""
    return Message(RecordDict(), reply_to=message) if message.metadata.message_type in (END, REJECTED) else None


def _client_id(args: argparse.Namespace) -> str:
    client = args.client_id or (args.key.resolve().parent.name if args.key else socket.gethostname())
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", client):
        raise ConfigError(
            f"the client name '{client}' is invalid: give a --client-id of at most 64 letters, digits, dots, dashes and underscores"
        )
    return client


def _device(asked: str | None) -> str | None:
    """The profile: `auto`, a name, or the absolute path of a file."""
    if asked is None or asked == "auto" or not asked.endswith((".yaml", ".yml")):
        return asked
    if not Path(asked).expanduser().is_file():
        raise ConfigError(f"--device {asked}: no such file")
    return os.path.abspath(Path(asked).expanduser())


def _report(text: str, **fields: Any) -> None:
    _log.info(text, extra=fields)
    print(f"fedtune-client: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

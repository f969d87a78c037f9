"""A process that serves one model on a listening socket of its parent. The parent can hand the socket over to the process of another model.

    python -P -m fedtune.inference.serve.handover FD FOLDER NAME

It prints one line to standard output: `ready` and a JSON object when it accepts connections, or the reason why it cannot. The exit code is
then 2, or 3 if the model generates no text, or 1 for an unexpected error. When its standard input has data or ends, the process accepts no
more connections, answers all accepted requests, and exits. SIGTERM stops it as it stops `fedtune serve`. Everything else goes to standard
error. It never outlives its parent.
"""

import argparse
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from fedtune.errors import user_message
from fedtune.inference.serve.limits import ApiKeys, Limits
from fedtune.inference.serve.server import Server
from fedtune.storage.parent import exit_with_parent

ALIAS = "current"  # a name for whichever model is served
NO_TEXT = 3  # exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until standard input or a signal ends it. Returns the exit code."""
    parent = os.getppid()
    out = _take_stdout()
    exit_with_parent(parent)
    parser = argparse.ArgumentParser(prog="fedtune.inference.serve.handover", description="Serve a model on a parent's socket.")
    parser.add_argument("fd", type=int, help="file descriptor of the listening socket")
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("name", help="the model's name")
    args = parser.parse_args(argv)
    shared = _Shared()
    threading.Thread(target=_leave_on_input, args=(shared, parent), name="input", daemon=True).start()
    try:
        return _serve(args.fd, args.model, args.name, shared, out)
    except Exception as bad:
        try:
            why, code = user_message(bad), 2
        except Exception:
            traceback.print_exc()
            why, code = f"{type(bad).__name__}: {bad}", 1
        print(" ".join(why.split()), file=out, flush=True)
        return code


class _Shared:
    """The server, shared with the thread that waits for standard input; None until its model is loaded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: Server | None = None


def _serve(fd: int, model: Path, name: str, shared: _Shared, out: IO[str]) -> int:
    from fedtune.inference.generate import NoText
    from fedtune.inference.serve.served_model import ServedModel
    from fedtune.inference.serve.start import log_to_stderr, make_server

    def rename(served: ServedModel) -> ServedModel:
        """Set the served names. A package with one separate adapter is served with that adapter."""
        return replace(served, name=name, aliases=(ALIAS,), chosen=served.adapters[0] if len(served.adapters) == 1 else None)

    def ready() -> None:
        print("ready", json.dumps({"model": name, "description": made.description}), file=out, flush=True)

    log_to_stderr()
    with socket.socket(fileno=fd) as listener:
        try:
            made = make_server(model, listener, ApiKeys.find(None), Limits(), rename=rename, ready=ready)
        except NoText as bad:
            print(bad, file=out, flush=True)
            return NO_TEXT
        with shared.lock:
            shared.server = made.server
        made.server.serve_on(listener)
    return 0


def _leave_on_input(shared: _Shared, parent: int) -> None:
    """Wait for standard input, then let the server finish, within the timeout of a request. Without parent or server, exit at once."""
    os.read(0, 1)
    with shared.lock:  # no server begins meanwhile
        if os.getppid() != parent or shared.server is None:
            os._exit(1)
        shared.server.leave(Limits().timeout)


def _take_stdout() -> IO[str]:
    """A private copy of standard output; prints of libraries go to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


if __name__ == "__main__":
    sys.exit(main())

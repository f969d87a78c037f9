"""The SuperLink process: Flower's application on two ports, a public one behind a filter and a private one on the loopback.

The first line of its standard input says what to serve (JSON of `Task`), every further one asks something of the LinkState; each gets one
line of JSON on its standard output. It ends when its input ends, when its parent is gone, or on SIGTERM.
"""

import asyncio
import contextlib
import ctypes
import errno
import json
import logging
import logging.handlers
import os
import resource
import secrets
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import anyio.to_thread
import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from fedtune.errors import NetworkError
from fedtune.network import _flwr
from fedtune.network.database import make_database
from fedtune.network.linkstate import Registrar, read_keys
from fedtune.network.listener import Door, Guests
from fedtune.network.logs import JsonLines
from fedtune.network.public import Impatient, PublicPort
from fedtune.storage.parsing import parse_json

CONNECTIONS = 1000  # of the public port; more are refused
FILES = 4 * CONNECTIONS  # open at once: connections, and what serving each of them opens
BACKLOG = 256
THREADS = (
    1  # at Flower's requests: nearly each writes to the database, and SQLite lets those that find it locked sleep, for up to 0.1 s a time
)
LEAVING_S = 3.0  # to wait for the port: a SuperLink whose server was killed ends a moment after it
LOCKED_S = 15.0  # to wait for the database; less than the 20 s that a node waits for an answer
SILENT_S = 2.0  # between two looks for tasks that have gone silent, which is a matter of a minute
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger("fedtune.superlink")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one SuperLink process is to do: the settings of its owner (link.py) as JSON can carry them."""

    folder: str
    log: str
    host: str
    port: int
    private_port: int  # 0 takes any free one
    certificate: str | None
    certificate_key: str | None
    allowed_keys: dict[str, str] | None
    max_body: int
    parent: int

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def _log_to(file: Path) -> None:
    """Everything that is logged in this process goes to one file of at most 3 × 10 MB, and nothing to a terminal."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=10_000_000, backupCount=2, encoding="utf-8")
    handler.setFormatter(JsonLines())
    logging.getLogger("flwr").handlers.clear()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _allow_files() -> None:
    """Raise the limit of open files to `FILES`, or as far as it goes: many systems set it to 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _die_with(parent: int) -> None:
    """Let the kernel end this process with its parent; where it cannot (no Linux), a watch does within a second."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _listen(host: str, port: int, guests: Guests | None = None) -> socket.socket:
    """A listening socket; one with `guests` refuses whom they refuse."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    until = time.monotonic() + LEAVING_S
    while True:
        sock = socket.socket(family) if guests is None else Door(family, guests)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it: no answer waits 40 ms for an ACK
        try:
            sock.bind((host, port))
            sock.listen(BACKLOG)
            return sock
        except OSError as bad:
            sock.close()
            if bad.errno == errno.EADDRINUSE and time.monotonic() < until:
                time.sleep(0.1)
                continue
            why = {
                errno.EADDRINUSE: "the port is in use; stop the other server or give --address",
                errno.EACCES: "only root may use this port; give --address with one above 1023",
                errno.EADDRNOTAVAIL: "this machine has no such address; give --address",
            }.get(bad.errno or 0, f"{bad.strerror or bad}; give --address")
            raise NetworkError(f"cannot listen on {host}:{port}: {why}") from None


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def, override]
        yield


def _make_app(task: Task, keys: dict[bytes, str] | None) -> tuple[FastAPI, Registrar]:
    """Flower's application on its database, and the hand on it once all allowed keys are in."""
    folder = Path(task.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        database = folder / "superlink.db"
        make_database(database, LOCKED_S)
        _flwr.patient_database(LOCKED_S)
        _flwr.seldom_end_silent_tasks(SILENT_S)
        config = _flwr.SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host=task.host,
            port=task.port,
            insecure=True,  # of the private port; the public one has its own certificates
            certificates=None,
            superexec_auth_secret=secrets.token_bytes(32),  # nobody knows it: no local process may fetch a task and act as the server
            authn_plugin=_flwr.NoOpControlAuthnPlugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=keys is not None,
            fleet_api_type="",
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(database),
            isolation="process",
            runtime_dependency_install=False,
        )
        app = _flwr.create_app(config, _flwr.SuperLinkLifespan)
        registrar = Registrar(app.state.linkstate_factory.state(), keys)
        registrar.admit()
        return app, registrar
    except (SQLAlchemyError, sqlite3.Error, OSError) as bad:
        why = getattr(bad, "orig", None) or getattr(bad, "strerror", None) or bad
        raise NetworkError(f"cannot keep the SuperLink's database in {folder}: {why}; free the disk or move the run directory") from None


def _servers(task: Task, app: FastAPI, keys: dict[bytes, str] | None, registrar: Registrar, guests: Guests) -> tuple[_Server, _Server]:
    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "http": Impatient, "ws": "none", "loop": "asyncio"}
    quiet |= {"proxy_headers": False, "server_header": False, "timeout_graceful_shutdown": 2}
    public = uvicorn.Config(
        PublicPort(app, max_body=task.max_body, keys=keys, takeover=registrar.takeover, idle=registrar.idle, welcome=guests.welcome),
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        ssl_certfile=task.certificate,
        ssl_keyfile=task.certificate_key,
        **quiet,
    )
    try:
        public.load()
    except (OSError, ssl.SSLError) as bad:
        raise NetworkError(
            f"cannot use the certificate {task.certificate} with its key: {bad.strerror or bad}; see `fedtune keys`"
        ) from None
    return _Server(public), _Server(uvicorn.Config(app, lifespan="on", **quiet))


def _answer(registrar: Registrar, request: dict[str, Any]) -> dict[str, Any]:
    try:
        match request["do"]:
            case "open_run":
                return registrar.open_run(request["name"])
            case "arrived":
                return registrar.arrived(request["ids"], request.get("most"))
            case "nodes":
                return registrar.nodes()
            case "allow":
                return registrar.allow(request["keys"])
            case unknown:
                return {"error": f"the SuperLink process knows no '{unknown}'"}
    except NetworkError as bad:
        return {"error": str(bad)}
    except SQLAlchemyError as bad:
        if isinstance(bad, OperationalError) and "locked" in str(bad.orig):
            return {"busy": "its database is busy"}  # a slow machine, or one with much to do: nothing is broken
        _log.exception("database")
        return {"error": f"the SuperLink's database fails: {getattr(bad, 'orig', None) or bad}; free the disk and start again"}


def _converse(registrar: Registrar, questions: TextIO, answers: TextIO, servers: tuple[_Server, _Server]) -> None:
    """Answer until the input ends; then stop."""
    for line in questions:
        print(json.dumps(_answer(registrar, parse_json(line))), file=answers, flush=True)
    for server in servers:
        server.should_exit = True


async def _serve(task: Task, answers: TextIO) -> None:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    keys = None if task.allowed_keys is None else read_keys(task.allowed_keys)
    guests = Guests(CONNECTIONS)
    doors = [_listen(task.host, task.port, guests), _listen("127.0.0.1", task.private_port)]
    app, registrar = _make_app(task, keys)
    servers = _servers(task, app, keys, registrar, guests)

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    running = [asyncio.create_task(server.serve([door])) for server, door in zip(servers, doors, strict=True)]
    while not all(server.started for server in servers) and not any(job.done() for job in running):
        await asyncio.sleep(0.01)
    print(json.dumps({"port": doors[0].getsockname()[1], "private_port": doors[1].getsockname()[1]}), file=answers, flush=True)
    threading.Thread(target=_converse, args=(registrar, sys.stdin, answers, servers), daemon=True).start()
    _log.info("listening", extra={"why": f"{task.host}:{task.port}"})
    await asyncio.gather(*running)


def main() -> None:
    """Run until told to stop. Exit code 1 where it could not start; the reason is then its only answer."""
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, who decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whoever prints by mistake must not be taken for an answer
    task = Task(**parse_json(sys.stdin.readline()))
    _die_with(task.parent)
    _allow_files()
    try:
        _log_to(Path(task.log))
        asyncio.run(_serve(task, answers))
    except NetworkError as bad:
        print(json.dumps({"error": str(bad)}), file=answers, flush=True)
        sys.exit(1)
    except OSError as bad:
        print(json.dumps({"error": f"the SuperLink cannot start: {bad}"}), file=answers, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

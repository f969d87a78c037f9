"""The SuperLink process: Flower's application on two ports, a public one behind a filter and a private one on the loopback.

The first line of its standard input holds its settings (JSON of `ProcessSettings`), every further line a request to the LinkState. Each is
answered by one line of JSON on standard output. The process ends with its input, with its parent, or on SIGTERM.
"""

import asyncio
import contextlib
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
from fedtune.network.listener import Connections, LimitedListener
from fedtune.network.logs import JsonLines
from fedtune.network.public import PublicPort, StallTimeout
from fedtune.storage.parent import exit_with_parent
from fedtune.storage.parsing import parse_json

CONNECTIONS = 1000  # limit of the public port
FILES = 4 * CONNECTIONS  # open files: connections, and the files opened to serve them
BACKLOG = 256
THREADS = 1  # for Flower's requests: nearly all write to the database, and SQLite lets concurrent writers sleep up to 0.1 s at a time
PORT_WAIT_S = 3.0  # to wait for the port: the SuperLink of a killed server ends shortly after it
LOCK_TIMEOUT_S = 15.0  # to wait for a locked database; less than the 20 s that a node waits for a response
CLEANUP_S = 2.0  # between cleanups of tasks without a heartbeat, which expire after a minute

_log = logging.getLogger("fedtune.superlink")


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Settings of one SuperLink process, from its owner (link.py); plain JSON values."""

    folder: str
    log: str
    host: str
    port: int
    private_port: int  # 0 selects a free one
    certificate: str | None
    certificate_key: str | None
    allowed_keys: dict[str, str] | None
    max_body: int
    parent: int

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def _log_to(file: Path) -> None:
    """Write all log records of this process to one file of at most 3 × 10 MB, and none to the terminal."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(file, maxBytes=10_000_000, backupCount=2, encoding="utf-8")
    handler.setFormatter(JsonLines())
    logging.getLogger("flwr").handlers.clear()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _raise_file_limit() -> None:
    """Raise the limit of open files to `FILES` or the system's maximum: many systems set it to 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _exit_with_parent(parent: int) -> None:
    """End this process with its parent: by the kernel on Linux, elsewhere by a thread within a second."""
    exit_with_parent(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _listen(host: str, port: int, connections: Connections | None = None) -> socket.socket:
    """Return a listening socket; with `connections`, their limits apply."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    until = time.monotonic() + PORT_WAIT_S
    while True:
        sock = socket.socket(family) if connections is None else LimitedListener(family, connections)
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


def _make_app(settings: ProcessSettings, keys: dict[bytes, str] | None) -> tuple[FastAPI, Registrar]:
    """Return Flower's application on its database, and the registrar."""
    folder = Path(settings.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        database = folder / "superlink.db"
        make_database(database, LOCK_TIMEOUT_S)
        _flwr.set_lock_timeout(LOCK_TIMEOUT_S)
        _flwr.throttle_task_cleanup(CLEANUP_S)
        config = _flwr.SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host=settings.host,
            port=settings.port,
            insecure=True,  # the private port; the public one has its own certificates
            certificates=None,
            superexec_auth_secret=secrets.token_bytes(32),  # never revealed: no local process may fetch a task and act as the server
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
        registrar.sync_nodes()
        return app, registrar
    except (SQLAlchemyError, sqlite3.Error, OSError) as bad:
        why = getattr(bad, "orig", None) or getattr(bad, "strerror", None) or bad
        raise NetworkError(f"cannot write the SuperLink's database in {folder}: {why}; free the disk or move the run directory") from None


def _servers(
    settings: ProcessSettings, app: FastAPI, keys: dict[bytes, str] | None, registrar: Registrar, connections: Connections
) -> tuple[_Server, _Server]:
    common: dict[str, Any] = {"log_config": None, "access_log": False, "http": StallTimeout, "ws": "none", "loop": "asyncio"}
    common |= {"proxy_headers": False, "server_header": False, "timeout_graceful_shutdown": 2}
    public = uvicorn.Config(
        PublicPort(
            app,
            max_body=settings.max_body,
            keys=keys,
            take_over=registrar.take_over,
            redeliver_lost=registrar.redeliver_lost,
            authenticated=connections.authenticate,
        ),
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.certificate_key,
        **common,
    )
    try:
        public.load()
    except (OSError, ssl.SSLError) as bad:
        raise NetworkError(
            f"cannot use the certificate {settings.certificate} with its key: {bad.strerror or bad}; see `fedtune keys`"
        ) from None
    return _Server(public), _Server(uvicorn.Config(app, lifespan="on", **common))


def _answer(registrar: Registrar, request: dict[str, Any]) -> dict[str, Any]:
    try:
        match request["do"]:
            case "open_run":
                return registrar.open_run(request["name"])
            case "arrived":
                return registrar.reply_states(request["ids"], request.get("most"))
            case "nodes":
                return registrar.nodes()
            case "allow":
                return registrar.allow(request["keys"])
            case unknown:
                return {"error": f"the SuperLink process has no request '{unknown}'"}
    except NetworkError as bad:
        return {"error": str(bad)}
    except SQLAlchemyError as bad:
        if isinstance(bad, OperationalError) and "locked" in str(bad.orig):
            return {"busy": "its database is busy"}  # a slow or busy machine, not an error
        _log.exception("database")
        return {"error": f"the SuperLink's database fails: {getattr(bad, 'orig', None) or bad}; free the disk and start again"}


def _answer_requests(registrar: Registrar, questions: TextIO, answers: TextIO, servers: tuple[_Server, _Server]) -> None:
    """Answer requests until the input ends; then stop the servers."""
    for line in questions:
        print(json.dumps(_answer(registrar, parse_json(line))), file=answers, flush=True)
    for server in servers:
        server.should_exit = True


async def _serve(settings: ProcessSettings, answers: TextIO) -> None:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    keys = None if settings.allowed_keys is None else read_keys(settings.allowed_keys)
    connections = Connections(CONNECTIONS)
    sockets = [_listen(settings.host, settings.port, connections), _listen("127.0.0.1", settings.private_port)]
    app, registrar = _make_app(settings, keys)
    servers = _servers(settings, app, keys, registrar, connections)

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    running = [asyncio.create_task(server.serve([socket_])) for server, socket_ in zip(servers, sockets, strict=True)]
    while not all(server.started for server in servers) and not any(job.done() for job in running):
        await asyncio.sleep(0.01)
    print(json.dumps({"port": sockets[0].getsockname()[1], "private_port": sockets[1].getsockname()[1]}), file=answers, flush=True)
    threading.Thread(target=_answer_requests, args=(registrar, sys.stdin, answers, servers), daemon=True).start()
    _log.info("listening", extra={"why": f"{settings.host}:{settings.port}"})
    await asyncio.gather(*running)


def main() -> None:
    """Serve until stopped. Exits with code 1 if it cannot start; its only answer is then the reason."""
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner handles Ctrl-C
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a stray print must not look like an answer
    settings = ProcessSettings(**parse_json(sys.stdin.readline()))
    _exit_with_parent(settings.parent)
    _raise_file_limit()
    try:
        _log_to(Path(settings.log))
        asyncio.run(_serve(settings, answers))
    except NetworkError as bad:
        print(json.dumps({"error": str(bad)}), file=answers, flush=True)
        sys.exit(1)
    except OSError as bad:
        print(json.dumps({"error": f"the SuperLink cannot start: {bad}"}), file=answers, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

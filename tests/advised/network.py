"""The advice of both ends of the network: the SuperLink, the link to it, and a client's node."""

import errno
import http.server
import json
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from sqlalchemy.exc import OperationalError

from fedtune.network import link, superlink
from fedtune.network.frames import LARGEST, Kind, write_frame
from fedtune.network.link import LinkSettings, SuperLink
from fedtune.network.linkstate import read_keys
from fedtune.network.node import Node
from fedtune.network.public import _KEY, PublicPort
from tests.advised.keys import client_of, folder
from tests.advised.rows import Place, error_of, follows
from tests.network.loopback import free_port

# -- the SuperLink ------------------------------------------------------------------------------------------------------------------------


def _listen_error(host: str, port: int) -> str:
    return error_of(lambda: superlink._listen(host, port).close())


def _other_address(place: Place, host: str, port: int) -> Iterator[str]:
    place.patch.setattr(superlink, "PORT_WAIT_S", 0.0)
    yield _listen_error(host, port)
    yield _listen_error("127.0.0.1", free_port())


@follows("the port is in use; stop the other server or give --address")
def _(place: Place) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        yield from _other_address(place, "127.0.0.1", port)
    yield _listen_error("127.0.0.1", port)


@follows("only root may use this port; give --address with one above 1023")
def _(place: Place) -> Iterator[str]:
    bind = socket.socket.bind

    def as_a_user(self: socket.socket, address: tuple[str, int]) -> None:
        if 0 < address[1] < 1024:
            raise OSError(errno.EACCES, "Permission denied")
        bind(self, address)

    place.patch.setattr(superlink.socket, "socket", type("Socket", (socket.socket,), {"bind": as_a_user}))
    yield from _other_address(place, "127.0.0.1", 443)


@follows("this machine has no such address; give --address")
def _(place: Place) -> Iterator[str]:
    yield from _other_address(place, "203.0.113.1", 8080)


@follows("{}; give --address")
def _(place: Place) -> Iterator[str]:
    yield from _other_address(place, "not a host", 8080)


def _task(at: Path, **changes: Any) -> superlink.ProcessSettings:
    plain: dict[str, Any] = {"folder": str(at), "log": str(at / "log"), "host": "127.0.0.1", "port": 0, "private_port": 0}
    plain |= {"certificate": None, "certificate_key": None, "allowed_keys": None, "max_body": 1 << 20, "parent": 0}
    return superlink.ProcessSettings(**plain | changes)


@follows("cannot write the SuperLink's database in {}: {}; free the disk or move the run directory", slow=True)
def _(place: Place) -> Iterator[str]:
    yield error_of(lambda: superlink._make_app(_task(Path("/proc/no")), None))
    yield error_of(lambda: superlink._make_app(_task(place.folder / "moved"), None))


@follows("cannot use the certificate {} with its key: {}; see `fedtune keys`")
def _(place: Place) -> Iterator[str]:
    keys = Path(folder(place)["keys"])

    def serves(certificate: Path, key: Path) -> str:
        task = _task(place.folder, certificate=str(certificate), certificate_key=str(key))
        hand: Any = SimpleNamespace(take_over=None, redeliver_lost=None, authenticate=None)
        return error_of(lambda: superlink._servers(task, SimpleNamespace(), None, hand, hand))  # type: ignore[arg-type]

    yield serves(keys / "server.pem", keys / "ca.key")
    assert not place.run("fedtune", "keys", "--out", place.folder / "new", "--server-name", "h", "--clients", "a")
    yield serves(place.folder / "new/server.pem", place.folder / "new/server.key")


@follows("the SuperLink's database fails: {}; free the disk and start again")
def _(place: Place) -> Iterator[str]:
    full = iter([True, False])

    def nodes() -> dict[str, Any]:
        if next(full):
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        return {"nodes": []}

    hand: Any = SimpleNamespace(nodes=nodes)
    yield superlink._answer(hand, {"do": "nodes"})["error"]
    yield superlink._answer(hand, {"do": "nodes"}).get("error", "")


# -- the link to it -----------------------------------------------------------------------------------------------------------------------


def _settings(at: Path, **changes: Any) -> LinkSettings:
    plain: dict[str, Any] = {"folder": at / "superlink", "host": "127.0.0.1", "port": 0, "certificates": None, "insecure": True}
    return LinkSettings(**plain | changes)


@follows("the server has no certificates: make some with `fedtune keys`, or give --insecure")
def _(place: Place) -> Iterator[str]:
    yield error_of(lambda: SuperLink(_settings(place.folder, insecure=False)))
    yield error_of(lambda: SuperLink(_settings(place.folder)))
    keys = Path(folder(place)["keys"])
    files = tuple(keys / name for name in ("ca.pem", "server.pem", "server.key"))
    yield error_of(lambda: SuperLink(_settings(place.folder, insecure=False, certificates=files)))


def _start_error(settings: LinkSettings) -> str:
    link = SuperLink(settings)
    try:
        return error_of(link.start)
    finally:
        link.stop()


@follows("cannot start the SuperLink: {}: {}; free the disk or move the run directory", slow=True)
def _(place: Place) -> Iterator[str]:
    yield _start_error(_settings(place.folder, log=Path("/proc/no/superlink.jsonl")))
    yield _start_error(_settings(place.folder))


def _log_of(error: str) -> str:
    """An error if the log file that a sentence names does not exist, else ""."""
    return "" if Path(error.rpartition("see ")[2].strip()).is_file() else f"there is no log: {error}"


@follows("it ended; see {}")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(link.sys, "executable", "/bin/false")
    (place.folder / "superlink").mkdir()
    error = _start_error(_settings(place.folder))
    yield error
    yield _log_of(error)


@follows("the SuperLink ended {} times within {} s: see {}", slow=True)
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(link, "_MAX_CRASHES", 1)
    one = SuperLink(_settings(place.folder))
    one.start()
    assert one._child is not None
    one._child.process.kill()
    with one._change:
        one._change.wait_for(lambda: one._failure is not None, 20)
    message = str(one._failure)
    yield message
    yield _log_of(message)


@follows("the SuperLink did not come back within {} s: see {}", slow=True)
def _(place: Place) -> Iterator[str]:
    one = SuperLink(_settings(place.folder))
    one.start()
    child, one._child = one._child, None
    message = error_of(lambda: one.wait(0.0))
    one._child = child
    one.stop()
    yield message
    yield _log_of(message)


def _key_errors(place: Place, bad: str) -> Iterator[str]:
    keys = folder(place)
    yield error_of(lambda: read_keys({"a": bad}))
    yield error_of(lambda: read_keys({"a": (Path(keys["a"]) / "key.pub").read_text()}))


@follows("the public key of client '{}' cannot be read: use the text of clients/{}/key.pub")
def _(place: Place) -> Iterator[str]:
    yield from _key_errors(place, "ssh-rsa AAAA")


@follows("the public key of client '{}' is not on a NIST curve: use the text of clients/{}/key.pub")
def _(place: Place) -> Iterator[str]:
    yield from _key_errors(place, "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFhoZiz3zWvAc7E8UqORNcNvxFCV8FFqJqI9Dkuj3fnQ")


@follows("cannot {}: Flower has ended the run; open a new one", slow=True)
def _(place: Place) -> Iterator[str]:
    one = SuperLink(_settings(place.folder))
    one.start()
    grid = one.open_run("one")
    one.ask(5, do="open_run", name="another")  # as a restarted server does
    yield error_of(lambda: list(grid.get_node_ids()))
    yield error_of(lambda: list(one.open_run("new").get_node_ids()))
    one.stop()


@follows("bytes does not fit in one frame of at most {}: send a smaller adapter")
def _(place: Place) -> Iterator[str]:
    class Sized(bytes):
        def __len__(self) -> int:
            return LARGEST + 1

    with open(place.folder / "pipe", "wb") as pipe:
        yield frame_error(lambda: write_frame(pipe, next(iter(Kind)), Sized()))
        yield frame_error(lambda: write_frame(pipe, next(iter(Kind)), b"smaller"))


def frame_error(call: Any) -> str:
    from fedtune.network.frames import FrameError

    try:
        call()
    except FrameError as bad:
        return str(bad)
    return ""


# -- a client's node ----------------------------------------------------------------------------------------------------------------------


@follows("this client has no key, and a server with TLS identifies clients by their keys: give --key FILE")
def _(place: Place) -> Iterator[str]:
    keys = Path(folder(place)["a"])
    plain: dict[str, Any] = {"server": "h:1", "root_certificates": keys / "ca.pem", "insecure": False, "max_retries": 0}
    yield error_of(lambda: Node(key=None, answer=print, report=print, **plain))  # type: ignore[arg-type]
    yield error_of(lambda: Node(key=keys / "key", answer=print, report=print, **plain))  # type: ignore[arg-type]


def _client_with(place: Place, harm: Any) -> Iterator[str]:
    """A row about a client with damaged files, then with those of `fedtune keys`."""
    place.patch.setattr(Node, "serve", lambda self: None)
    keys = folder(place)
    harm(Path(keys["a"]))
    yield place.run(*client_of(keys, place.folder / "state"))
    assert not place.run("fedtune", "keys", "--out", place.folder / "new", "--server-name", "h", "--clients", "a")
    yield place.run(*client_of({"a": str(place.folder / "new/clients/a")}, place.folder / "state"))


@follows("the CA file {} is invalid ({}): give the ca.pem of the server")
def _(place: Place) -> Iterator[str]:
    yield from _client_with(place, lambda at: (at / "ca.pem").write_text("no certificate"))


@follows("the key {} is a {}, wanted an elliptic-curve key: `fedtune keys` makes one")
def _(place: Place) -> Iterator[str]:
    yield from _client_with(place, _write_ed25519_key)


def _write_ed25519_key(at: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    (at / "key").write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))


@follows("the key {} is invalid ({}): give one that `fedtune keys` made")
def _(place: Place) -> Iterator[str]:
    place.patch.setattr(
        "fedtune.network.keys.check_private_key", lambda path: None
    )  # this earlier check reports it, unless the file changes in between
    yield from _client_with(place, lambda at: (at / "key").write_text("no key"))


# -- a server's answers to a node ---------------------------------------------------------------------------------------------------------


@contextmanager
def serve_answer(status: int = 503, tls: Path | None = None, **headers: str) -> Iterator[str]:
    """A server that gives this answer to everything; yields HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802  the library's name
            self.send_response_only(status)
            for name, value in {"Content-Length": "0", "Date": formatdate(usegmt=True), **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Print no log line."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "server.pem", tls / "server.key")
            one.socket = context.wrap_socket(one.socket, server_side=True)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"localhost:{one.server_address[1]}"
        one.shutdown()


def last_line(place: Place, server: str, at: Path | None = None, retries: int = 0) -> str:
    """The last line of a client's output, with this server and the key at `at`."""
    flags = ["--key", f"{at}/key", "--root-certificates", f"{at}/ca.pem"] if at else ["--insecure"]
    more = ["--client-id", "a", "--state", str(place.folder / "state"), "--max-retries", str(retries)]
    return place.run("fedtune-client", "--server", server, *flags, *more).splitlines()[-1]


@follows("the certificate of {} does not match {} ({}):")
def _(place: Place) -> Iterator[str]:
    keys = Path(folder(place)["keys"])
    assert not place.run("fedtune", "keys", "--out", place.folder / "other", "--server-name", "h", "--clients", "a")
    with serve_answer(tls=keys) as server:
        error = last_line(place, server, place.folder / "other/clients/a")
        yield error
        yield _port_error(last_line(place, server, keys / "clients/a"))


@follows("this machine's clock is {} s {} that of {}, which refuses the request: set the clock")
def _(place: Place) -> Iterator[str]:
    with serve_answer(401, Date=formatdate(time.time() - 3600, usegmt=True)) as server:
        yield last_line(place, server)
    with serve_answer(401) as server:  # client and server have the same time
        error = last_line(place, server)
        yield error if "clock" in error else ""


@contextmanager
def open_port(at: Path, keys: dict[bytes, str], beats: Callable[[PublicPort, bytes], Any] = lambda port, key: None) -> Iterator[str]:
    """The public port of a server that accepts these keys and has no application; yields HOST:PORT.

    Other arguments: beats, called with the port and a caller's key after each accepted request.
    """

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        beats(app, dict(scope["headers"])[_KEY])
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    port, certificate, key = free_port(), at / "server.pem", at / "server.key"
    app: Any = PublicPort(nothing, max_body=1 << 20, keys=keys)
    one = superlink._Server(
        uvicorn.Config(app, "127.0.0.1", port, lifespan="off", log_config=None, ssl_certfile=certificate, ssl_keyfile=key)
    )
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    while not one.started:
        time.sleep(0.01)
    yield f"localhost:{port}"
    one.should_exit = True
    thread.join(10)


@follows("{} does not know the key {}: add its public key to the allowed keys there")
def _(place: Place) -> Iterator[str]:
    keys = Path(folder(place)["keys"])
    allowed = json.loads((keys / "allowed.json").read_text())
    known = read_keys({"b": allowed["b"]})
    with open_port(keys, known) as server:
        yield last_line(place, server, keys / "clients/a")
        known |= read_keys({"a": (keys / "clients/a/key.pub").read_text()})
        yield _port_error(last_line(place, server, keys / "clients/a"))


@follows("another process is connected to {} with the key {}: stop one of them, or give each its own key", slow=True)
def _(place: Place) -> Iterator[str]:
    keys = Path(folder(place)["keys"])
    allowed = json.loads((keys / "allowed.json").read_text())
    (key,) = map(b64encode, read_keys({"a": allowed["a"]}))
    stopped: list[str] = []

    def beat(port: PublicPort, caller: bytes) -> None:
        if caller == key and not stopped:  # the first process is still running and sends a request
            port._incarnations._places[key].previous = "first"
            port._incarnations.may_call(key, "first", activates=False)

    with open_port(keys, read_keys(allowed), beat) as server:
        yield last_line(place, server, keys / "clients/a", retries=1)
        yield _port_error(last_line(place, server, keys / "clients/b", retries=1))
        stopped.append("first")
        yield _port_error(last_line(place, server, keys / "clients/a", retries=1))


def _port_error(error: str) -> str:
    """The error of a client that the public port refuses; "" if its request reaches the application behind the port."""
    return "" if "cannot answer now" in error else error or "the client printed nothing"

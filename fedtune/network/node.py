"""A client's place in the federation: holds it, fetches messages, and sends the replies, through whatever happens to the link.

A SuperNode of our own over Flower's Fleet API. Flower's gives up where the server refuses it, fetches the app's code and waits three
seconds between two looks; this one goes on until it is told to stop, runs only the fedtune that is installed, and looks ten times a second.

It answers one message after the other and asks for the next when it holds none. So the server knows which messages were lost on their way:
it delivers each of them once more (`linkstate.Registrar.idle`), and goes on without this client where one is lost again.
"""

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from flwr.app import Error, Message

from fedtune.errors import NetworkError
from fedtune.network import APP, fleet
from fedtune.network import _flwr_client as flwr
from fedtune.network.fleet import Faulty, Fleet, Occupied, Refused, RunOver, Trouble, Unreachable, Unrecognized
from fedtune.network.pack import is_packed, pack, unpack
from fedtune.storage.atomic import write_bytes
from fedtune.storage.parsing import content_of

HEARTBEAT = 10.0  # seconds; a sixth of the lease
POLL, SLOW_POLL, QUIET = 0.1, 1.0, 60.0  # seconds between two looks; the same once nothing came for QUIET seconds; that
SHARE = 10  # a look that takes long is a sign of a server that has much to do
FIRST_PAUSE = 0.5  # seconds before a failed call is tried again; doubles
FAULTS = 8  # answers of "internal error" after which one message is given up
SESSIONS = 5  # times that a reply is announced anew where the server has forgotten the session
PARTS_WAIT = 300.0  # seconds that the server may take to have a message whole

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@?#\[\]]+):(\d{1,5})")
_T = TypeVar("_T")


class _Stopping(Exception):
    """stop() was called."""


class _Stale(Trouble):
    """The server has given this node another id since the message came, so it is from another life of the server."""


class Node:
    """One client of a server.

    Args:
        server: HOST:PORT.
        root_certificates: PEM file of the CA that signed the server's certificate; None takes the system's CAs.
        key: PEM or OpenSSH file of the node's private key (elliptic curve). With `insecure`, a file that is made where it is not there, so
            that a restart keeps the node's id; None makes a key for this process only.
        insecure: Speak plain HTTP and register with whatever key there is.
        answer: The reply to a message, called from `serve`'s thread for one message after the other; gets the node's id, too.
        max_retries: Times that one call is tried again before `serve` gives up; None never does.
        told: Gets each sentence for the operator, from any thread.

    Raises:
        NetworkError: The address, the key or the CA file cannot be used.
    """

    def __init__(
        self,
        *,
        server: str,
        root_certificates: Path | None,
        key: Path | None,
        insecure: bool,
        answer: Callable[[Message, int], Message],
        max_retries: int | None,
        told: Callable[[str], None],
    ) -> None:
        if not (match := _ADDRESS.fullmatch(server)) or not 0 < int(match[2]) < 65536:
            raise NetworkError(f"the server's address is '{server}', wanted HOST:PORT, like 10.0.0.5:8080 or [fd00::5]:8080")
        identity, name = _identity(key, insecure)
        tls = None
        if not insecure:
            try:
                tls = fleet.tls_context(root_certificates)
            except OSError as bad:
                raise NetworkError(f"the CA file {root_certificates} cannot be used ({bad}): give the ca.pem of the server") from None
        authority = "the system's CAs" if root_certificates is None else f"the CA file {root_certificates}"
        self._fleet = Fleet(server, tls, authority, identity, name)
        self._name, self._answer, self._max_retries, self._told = name, answer, max_retries, told
        self._stopped, self._joining, self._trouble = threading.Event(), threading.Lock(), ""
        self._apps: dict[int, str] = {}  # run → app id
        self._outside_since = 0.0  # when the server first let us wait at the door; 0 while it does not

    def serve(self) -> None:
        """Answer messages until stop(), which may come from any thread or a signal handler.

        Raises:
            NetworkError: `max_retries` were not enough.
        """
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        try:
            with suppress(_Stopping):
                self._insist(self._join)
                heart.start()
                self._work()
        finally:
            self._stopped.set()
            if self._fleet.node_id and not self._trouble:
                with suppress(Trouble):
                    self._fleet.leave()
            self._fleet.close()

    def stop(self) -> None:
        """Make `serve` return after the message that it is at."""
        self._stopped.set()

    def _work(self) -> None:
        busy = time.monotonic()
        while True:
            began = time.monotonic()
            found = self._insist(self._fleet.pull)
            if found is not None:
                with suppress(RunOver):  # nobody waits for the reply
                    self._take(*found)
                busy = time.monotonic()
                continue
            quiet, cost = time.monotonic() - busy > QUIET, time.monotonic() - began
            self._wait(max(self._fleet.pace, min(SLOW_POLL, max(SLOW_POLL if quiet else POLL, SHARE * cost))))

    def _take(self, head: Message, tree: flwr.ObjectTree) -> None:
        """Fetch a message's content, have it answered, and send the reply."""
        about, node = head.metadata, self._fleet.node_id
        what = f"{about.message_type} message of group '{about.group_id}'"
        try:
            app = self._app_of(about.run_id, node)
            if app == APP:
                message = self._fetch(head, tree, node)
                began = time.monotonic()
                packed, message = is_packed(message), unpack(message)
                reply = self._reply_to(message, node)
                reply = pack(reply) if packed else reply
                seconds = time.monotonic() - began
                del message
            else:
                self._told(f"refused a {what}: its run is of the app '{app}', and this client runs {APP} only")
                reply, seconds = _error(head, f"this client runs {APP} only, not '{app}'"), 0.0
        except (RunOver, _Stopping, NetworkError):
            raise
        except Exception as bad:  # what a server sends is not ours to trust, and Flower raises many things where it is malformed
            self._told(f"dropped a {what}: {bad}")
            return
        try:
            self._send(reply, seconds, node)
        except (Refused, _Stale) as bad:
            self._told(f"dropped the reply to a {what}: {bad}")

    def _app_of(self, run_id: int, node: int) -> str:
        if run_id not in self._apps:
            self._apps[run_id] = self._insist(lambda: self._fleet.app_of(run_id), node)
        return self._apps[run_id]

    def _fetch(self, head: Message, tree: flwr.ObjectTree, node: int) -> Message:
        run_id = head.metadata.run_id
        whole = flwr.pull_and_inflate_object_from_tree(
            tree,
            lambda object_id: self._insist(lambda: self._fleet.pull_object(run_id, object_id), node),
            lambda object_id: self._insist(lambda: self._fleet.confirm(run_id, object_id), node),
            return_type=Message,
            max_time=PARTS_WAIT,
            max_tries_per_object=None,
            initial_backoff=POLL / 2,
            backoff_cap=SLOW_POLL,
        )
        if whole.has_error():
            raise Refused("it holds an error")
        return flwr.make_message(metadata=head.metadata, content=whole.content)

    def _reply_to(self, message: Message, node: int) -> Message:
        try:
            return self._answer(message, node)
        except Exception as bad:  # the server must hear of it, and the next message may go well
            self._told(f"could not answer a {message.metadata.message_type} message: {type(bad).__name__}: {bad}")
            return _error(message, f"{type(bad).__name__}: {bad}")

    def _send(self, reply: Message, seconds: float, node: int) -> None:
        """Send a reply as soon as the link allows.

        Raises:
            Refused: The server does not want it any more.
        """
        with flwr.no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = flwr.get_object_tree(reply)
            parts = {i: each.deflate() for i, each in flwr.get_all_nested_objects(reply).items()}
        head, run_id = flwr.remove_content_from_message(reply), reply.metadata.run_id
        for turn in range(SESSIONS):
            wanted, session = self._insist(lambda: self._fleet.push(head, tree, seconds), node)
            if not wanted and turn == 0:
                raise Refused("the server no longer waits for it")

            def part(object_id: str, content: bytes, session: str = session) -> None:
                self._insist(lambda: self._fleet.push_object(run_id, session, object_id, content), node)

            try:
                flwr.push_object_contents_from_iterable(((i, content) for i, content in parts.items() if i in wanted), part)
                return
            except flwr.ObjectPushError:
                continue  # the server was restarted in between: announce it again
        raise Refused("the server forgets what it is sent")

    def _insist(self, call: Callable[[], _T], node: int = 0) -> _T:
        """Make a call until it succeeds.

        Args:
            call: One call of the Fleet.
            node: Under which id the message came that the call is about. What is wrong with one message ends that message; a call about
                none (0) is repeated whatever the server says.
        """
        turns, tries, faults, lost = 0, 0, 0, False
        while True:
            if self._stopped.is_set():
                raise _Stopping
            try:
                if lost:
                    self._join()
                    lost = False
                if node and node != self._fleet.node_id:
                    raise _Stale("the server is another one than when it came")
                result = call()
            except (RunOver, _Stale):
                raise
            except Trouble as bad:
                turns += 1
                if isinstance(bad, Unrecognized) and turns == 1:
                    lost = True  # a server that was started anew: nothing to speak of if it takes the node again
                    continue
                faults += isinstance(bad, Faulty)
                if node and (faults > FAULTS or (isinstance(bad, Refused) and not lost)):
                    raise Refused(str(bad)) from None
                lost = lost or isinstance(bad, Unrecognized)
                self._complain(bad)
                tries += not isinstance(bad, Occupied)  # a lease ends by itself
                if self._max_retries is not None and tries > self._max_retries:
                    raise NetworkError(f"{bad}; gave up after {self._max_retries} retries") from None
                self._wait(min(bad.patience, FIRST_PAUSE * 2 ** min(turns - 1, 10)))
            else:
                if self._trouble:
                    self._trouble = ""
                    self._told(f"{self._fleet.server} answers again")
                return result

    def _join(self) -> None:
        """Hold or take the node's place, once."""
        with self._joining:
            before = self._fleet.node_id
            try:
                self._fleet.join()
            except Occupied:
                self._outside_since = self._outside_since or time.monotonic()
                if time.monotonic() - self._outside_since > 1.25 * fleet.LEASE:
                    raise fleet.refused_key(self._name, self._fleet.server) from None
                raise
            self._outside_since = 0.0
            if self._fleet.node_id != before:
                self._apps.clear()
                self._told(f"connected to {self._fleet.server}")

    def _beat(self) -> None:
        pause = HEARTBEAT
        while not self._stopped.wait(pause):
            try:
                self._join()
                pause = HEARTBEAT
            except Trouble as bad:
                if not isinstance(bad, Unreachable):
                    self._complain(bad)
                pause = min(HEARTBEAT, bad.patience)

    def _complain(self, bad: Trouble) -> None:
        """One sentence for one trouble, however often it comes."""
        if self._trouble != str(bad):
            self._trouble = str(bad)
            self._told(f"{bad}; trying again")

    def _wait(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise _Stopping


def _identity(key: Path | None, insecure: bool) -> tuple[EllipticCurvePrivateKey, str]:
    """A node's private key, and its name in sentences."""
    if key is None:
        if not insecure:
            raise NetworkError("this client has no key, and a server with TLS knows its clients by their keys: give --key FILE")
        return flwr.generate_key_pairs()[0], "of this process"
    try:
        if insecure and not key.exists():
            key.parent.mkdir(parents=True, exist_ok=True)
            made = flwr.private_key_to_bytes(flwr.generate_key_pairs()[0])
            write_bytes(key, made, mode=0o600, durable=False, shared=True)
        data = content_of(key)
    except OSError as bad:
        raise NetworkError(f"the key {key} cannot be read: {bad.strerror or bad}") from None
    try:
        load = load_ssh_private_key if b"BEGIN OPENSSH" in data else load_pem_private_key
        found = load(data, None)
    except (ValueError, TypeError) as bad:  # TypeError: it has a password
        raise NetworkError(f"the key {key} cannot be used ({bad}): give one that `fedtune keys` made") from None
    if not isinstance(found, EllipticCurvePrivateKey):
        raise NetworkError(f"the key {key} is a {type(found).__name__}, wanted an elliptic-curve key: `fedtune keys` makes one")
    return found, str(key)


def _error(message: Message, reason: str) -> Message:
    return Message(Error(code=flwr.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)

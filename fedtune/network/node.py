"""A client's node: stays connected to the server, fetches messages and sends replies, and survives failures of the link.

It replaces Flower's SuperNode over the Fleet API. Flower's exits when the server refuses it, downloads the app's code and polls every three
seconds; this one retries until it is stopped, runs only the installed fedtune, and polls ten times a second.

It answers one message at a time and polls only when it holds none. So the server knows which messages were lost in transit: it delivers
each once more (`linkstate.Registrar.redeliver_lost`), and continues without this client if one is lost again.
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
from fedtune.network.fleet import Fleet, FleetError, NotActivated, Refused, RunEnded, ServerFailed, Unreachable, Unrecognized
from fedtune.network.pack import is_packed, pack, unpack
from fedtune.storage.atomic import write_bytes
from fedtune.storage.parsing import content_of

HEARTBEAT = 10.0  # seconds; a sixth of the lease
POLL, SLOW_POLL, QUIET = 0.1, 1.0, 60.0  # seconds between polls; between polls after QUIET seconds without a message; QUIET
POLL_COST_FACTOR = 10  # wait POLL_COST_FACTOR times as long as a poll took: a slow poll means a busy server
FIRST_PAUSE = 0.5  # seconds before the first retry; doubles
MAX_SERVER_FAILURES = 8  # "internal error" responses after which a message is dropped
MAX_SESSIONS = 5  # announcements of a reply whose upload session the server has lost
PARTS_WAIT = 300.0  # seconds to wait until the server holds all objects of a message

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/@?#\[\]]+):(\d{1,5})")
_T = TypeVar("_T")


class _Stopping(Exception):
    """stop() was called."""


class _NodeChanged(FleetError):
    """The server has assigned this node a new id since the message came, so the server's database is new."""


class Node:
    """One client of a server.

    Args:
        server: HOST:PORT.
        root_certificates: PEM file of the CA that signed the server's certificate; None uses the system's CAs.
        key: PEM or OpenSSH file of the node's private key (elliptic curve). With `insecure`, a missing file is created, so that a restart
            keeps the node's id, and None creates a key for this process only.
        insecure: Use plain HTTP and register with any key.
        answer: (message, node id) → reply; called in `serve`'s thread, one message at a time.
        ends: Message → whether `serve` returns after its reply has been sent.
        max_retries: Retries of a call before `serve` gives up; None retries forever.
        report: Called with each sentence for the operator, from any thread.

    Raises:
        NetworkError: The address, the key or the CA file is invalid.
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
        report: Callable[[str], None],
        ends: Callable[[Message], bool] = lambda message: False,
    ) -> None:
        if not (match := _ADDRESS.fullmatch(server)) or not 0 < int(match[2]) < 65536:
            raise NetworkError(f"the server's address is '{server}': wanted HOST:PORT, like 10.0.0.5:8080 or [fd00::5]:8080")
        identity, name = _identity(key, insecure)
        tls = None
        if not insecure:
            try:
                tls = fleet.tls_context(root_certificates)
            except OSError as bad:
                raise NetworkError(f"the CA file {root_certificates} is invalid ({bad}): give the ca.pem of the server") from None
        authority = "the system's CAs" if root_certificates is None else f"the CA file {root_certificates}"
        self._fleet = Fleet(server, tls, authority, identity, name)
        self._name, self._answer, self._max_retries, self._report, self._ends = name, answer, max_retries, report, ends
        self._stopped, self._joining, self._last_error = threading.Event(), threading.Lock(), ""
        self._apps: dict[int, str] = {}  # run → app id
        self._inactive_since = 0.0  # when the server first refused to activate this node; 0 while it is active

    def serve(self) -> None:
        """Answer messages until stop(), which any thread or a signal handler may call.

        Raises:
            NetworkError: A call failed after `max_retries`.
        """
        heart = threading.Thread(target=self._heartbeat_loop, name="heartbeat", daemon=True)
        try:
            with suppress(_Stopping):
                self._retry(self._join)
                heart.start()
                self._work()
        finally:
            self._stopped.set()
            if self._fleet.node_id and not self._last_error:
                with suppress(FleetError):
                    self._fleet.leave()
            self._fleet.close()

    def stop(self) -> None:
        """Make `serve` return after the current message."""
        self._stopped.set()

    def _work(self) -> None:
        busy = time.monotonic()
        while True:
            began = time.monotonic()
            found = self._retry(self._fleet.pull)
            if found is not None:
                with suppress(RunEnded):  # the reply is not needed
                    self._handle(*found)
                if self._ends(found[0]):
                    return
                busy = time.monotonic()
                continue
            quiet, cost = time.monotonic() - busy > QUIET, time.monotonic() - began
            self._wait(max(self._fleet.pace, min(SLOW_POLL, max(SLOW_POLL if quiet else POLL, POLL_COST_FACTOR * cost))))

    def _handle(self, head: Message, tree: flwr.ObjectTree) -> None:
        """Fetch a message's content, answer it, and send the reply."""
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
                self._report(f"refused a {what}: its run belongs to the app '{app}'; this client runs only {APP}")
                reply, seconds = _error(head, f"this client runs only {APP}, not '{app}'"), 0.0
        except (RunEnded, _Stopping, NetworkError):
            raise
        except Exception as bad:  # the server is not trusted, and Flower raises many exceptions for malformed messages
            self._report(f"dropped a {what}: {bad}")
            return
        try:
            self._send(reply, seconds, node)
        except (Refused, _NodeChanged) as bad:
            self._report(f"dropped the reply to a {what}: {bad}")

    def _app_of(self, run_id: int, node: int) -> str:
        if run_id not in self._apps:
            self._apps[run_id] = self._retry(lambda: self._fleet.app_of(run_id), node)
        return self._apps[run_id]

    def _fetch(self, head: Message, tree: flwr.ObjectTree, node: int) -> Message:
        run_id = head.metadata.run_id
        whole = flwr.pull_and_inflate_object_from_tree(
            tree,
            lambda object_id: self._retry(lambda: self._fleet.pull_object(run_id, object_id), node),
            lambda object_id: self._retry(lambda: self._fleet.confirm(run_id, object_id), node),
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
        except Exception as bad:  # report it to the server; the next message may succeed
            self._report(f"could not answer a {message.metadata.message_type} message: {type(bad).__name__}: {bad}")
            return _error(message, f"{type(bad).__name__}: {bad}")

    def _send(self, reply: Message, seconds: float, node: int) -> None:
        """Send a reply as soon as the link allows.

        Raises:
            Refused: The server no longer waits for it.
        """
        with flwr.no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            tree = flwr.get_object_tree(reply)
            parts = {i: each.deflate() for i, each in flwr.get_all_nested_objects(reply).items()}
        head, run_id = flwr.remove_content_from_message(reply), reply.metadata.run_id
        for turn in range(MAX_SESSIONS):
            wanted, session = self._retry(lambda: self._fleet.push(head, tree, seconds), node)
            if not wanted and turn == 0:
                raise Refused("the server no longer waits for it")

            def part(object_id: str, content: bytes, session: str = session) -> None:
                self._retry(lambda: self._fleet.push_object(run_id, session, object_id, content), node)

            try:
                flwr.push_object_contents_from_iterable(((i, content) for i, content in parts.items() if i in wanted), part)
                return
            except flwr.ObjectPushError:
                continue  # the server restarted meanwhile: announce the reply again
        raise Refused(f"the server lost its upload session {MAX_SESSIONS} times")

    def _retry(self, call: Callable[[], _T], node: int = 0) -> _T:
        """Make a call until it succeeds.

        Args:
            call: One call of the Fleet.
            node: The node id under which the call's message came; a refusal drops that message. Calls without a message (0) are retried
                after any error.
        """
        failures, tries, server_failures, lost = 0, 0, 0, False
        while True:
            if self._stopped.is_set():
                raise _Stopping
            try:
                if lost:
                    self._join()
                    lost = False
                if node and node != self._fleet.node_id:
                    raise _NodeChanged("the server's database is new since the message came")
                result = call()
            except (RunEnded, _NodeChanged):
                raise
            except FleetError as bad:
                failures += 1
                if isinstance(bad, Unrecognized) and failures == 1:
                    lost = True  # the server was restarted: no report if it accepts the node again
                    continue
                server_failures += isinstance(bad, ServerFailed)
                if node and (server_failures > MAX_SERVER_FAILURES or (isinstance(bad, Refused) and not lost)):
                    raise Refused(str(bad)) from None
                lost = lost or isinstance(bad, Unrecognized)
                self._report_once(bad)
                tries += not isinstance(bad, NotActivated)  # a lease expires by itself
                if self._max_retries is not None and tries > self._max_retries:
                    raise NetworkError(f"{bad}; gave up after {self._max_retries} retries") from None
                self._wait(min(bad.max_pause_s, FIRST_PAUSE * 2 ** min(failures - 1, 10)))
            else:
                if self._last_error:
                    self._last_error = ""
                    self._report(f"{self._fleet.server} answers again")
                return result

    def _join(self) -> None:
        """Renew the node's lease or activate it, once."""
        with self._joining:
            before = self._fleet.node_id
            try:
                self._fleet.join()
            except NotActivated:
                self._inactive_since = self._inactive_since or time.monotonic()
                if time.monotonic() - self._inactive_since > 1.25 * fleet.LEASE:
                    raise fleet.key_refused(self._name, self._fleet.server) from None
                raise
            self._inactive_since = 0.0
            if self._fleet.node_id != before:
                self._apps.clear()
                self._report(f"connected to {self._fleet.server}")

    def _heartbeat_loop(self) -> None:
        pause = HEARTBEAT
        while not self._stopped.wait(pause):
            try:
                self._join()
                pause = HEARTBEAT
            except FleetError as bad:
                if not isinstance(bad, Unreachable):
                    self._report_once(bad)
                pause = min(HEARTBEAT, bad.max_pause_s)

    def _report_once(self, bad: FleetError) -> None:
        """Report an error once, however often it repeats."""
        if self._last_error != str(bad):
            self._last_error = str(bad)
            self._report(f"{bad}; trying again")

    def _wait(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise _Stopping


def _identity(key: Path | None, insecure: bool) -> tuple[EllipticCurvePrivateKey, str]:
    """Return a node's private key and its name for error sentences."""
    if key is None:
        if not insecure:
            raise NetworkError("this client has no key, and a server with TLS identifies clients by their keys: give --key FILE")
        return flwr.generate_key_pairs()[0], "of this process"
    try:
        if insecure and not key.exists():
            key.parent.mkdir(parents=True, exist_ok=True)
            generated = flwr.private_key_to_bytes(flwr.generate_key_pairs()[0])
            write_bytes(key, generated, mode=0o600, durable=False, shared=True)
        data = content_of(key)
    except OSError as bad:
        raise NetworkError(f"the key {key} cannot be read: {bad.strerror or bad}") from None
    try:
        load = load_ssh_private_key if b"BEGIN OPENSSH" in data else load_pem_private_key
        private = load(data, None)
    except (ValueError, TypeError) as bad:  # TypeError: it has a password
        raise NetworkError(f"the key {key} is invalid ({bad}): give one that `fedtune keys` made") from None
    if not isinstance(private, EllipticCurvePrivateKey):
        raise NetworkError(f"the key {key} is a {type(private).__name__}, wanted an elliptic-curve key: `fedtune keys` makes one")
    return private, str(key)


def _error(message: Message, reason: str) -> Message:
    return Message(Error(code=flwr.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)

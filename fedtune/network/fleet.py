"""Calls to the server's Fleet API, with errors in plain English.

Flower's own connection ends the process when the server refuses it. Here every failure is a `FleetError`, whose text is a sentence for the
operator; the caller decides whether to retry.
"""

import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message

from fedtune.network import _flwr_client as flwr
from fedtune.network.incarnations import INCARNATION_HEADER
from fedtune.network.pace import PACE, read_pace

LEASE = 60.0  # seconds that the server keeps a node active after its last heartbeat: two of Flower's intervals
AHEAD, BEHIND = 5.0, 305.0  # seconds that Flower tolerates a client's clock to be ahead or behind
_TIMEOUT = httpx.Timeout(connect=5.0, read=20.0, write=20.0, pool=60.0)  # seconds without data, not of the whole call


_Cause = TypeVar("_Cause", bound=BaseException)


class FleetError(Exception):
    """A call failed; the text is one sentence. `max_pause_s`: the longest pause before a retry, in seconds."""

    max_pause_s = 30.0


class Unreachable(FleetError):
    """The link or the server is down: a retry may succeed."""

    max_pause_s = 5.0


class ServerFailed(Unreachable):
    """The server failed on this call."""


class Unrecognized(FleetError):
    """The server does not know this node or this key."""


class NotActivated(FleetError):
    """The server does not activate the node: a previous process holds the lease, or the key is not allowed. Flower does not say which."""

    max_pause_s = 5.0


class KeyInUse(Unrecognized):
    """Another process is active with the same key."""


class Refused(FleetError):
    """The server refuses this call; a retry does not help."""


class RunEnded(FleetError):
    """The run of the message has ended."""


class _Headers:
    """Sends Flower's version and this process's incarnation, and reads the polling interval. Flower's interceptor exits on a mismatch."""

    pace = 0.0

    def __init__(self) -> None:
        self._headers = dict(flwr.RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
        self._headers[INCARNATION_HEADER] = secrets.token_hex(16)

    def intercept(self, context: flwr.ProtobufRequestContext, call_next: flwr.ProtobufCall) -> httpx.Response:
        context.request.headers.update(self._headers)
        response = call_next(context)
        self.pace = read_pace(response.headers.get(PACE, ""))
        return response


class Fleet:
    """One node's calls. Thread-safe.

    Args:
        server: HOST:PORT.
        tls: Verifies the server's certificate; None uses plain HTTP.
        authority: Source of `tls`, for error sentences.
        key: The node's private key.
        key_name: Source of `key`, for error sentences.
    """

    node_id: int = 0  # as last assigned by the server; 0 before that

    def __init__(self, server: str, tls: ssl.SSLContext | None, authority: str, key: EllipticCurvePrivateKey, key_name: str) -> None:
        self.server, self._insecure, self._authority, self._key_name = server, tls is None, authority, key_name
        self._public_key = flwr.public_key_to_bytes(key.public_key())
        self._headers = _Headers()
        self._client = flwr.FleetHttpClient(
            f"{'http' if tls is None else 'https'}://{server}",
            interceptors=[self._headers, flwr.NodeAuthHttpInterceptor(key, key.public_key())],
            verify=tls or False,
            timeout=_TIMEOUT,  # type: ignore[arg-type]  # passed to httpx unchanged
        )

    def join(self) -> None:
        """Renew the node's lease; if the server no longer knows the node, activate it again.

        Raises:
            FleetError: The node is not active.
        """
        if self.node_id:
            try:
                with self._translate_errors():
                    beat = flwr.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=LEASE / 2)
                    if self._client.SendNodeHeartbeat(beat).success:
                        return
            except Unrecognized:
                pass  # another database, or another key's node
        if self._insecure:
            try:
                with self._translate_errors():
                    self._client.RegisterNode(flwr.RegisterNodeFleetRequest(public_key=self._public_key))
            except NotActivated:
                pass  # it knows the key already
        with self._translate_errors():
            taken = self._client.ActivateNode(flwr.ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=LEASE / 2))
        self.node_id = taken.node_id

    def leave(self) -> None:
        """Deactivate the node, so that the next process can activate it at once."""
        with self._translate_errors():
            self._client.DeactivateNode(flwr.DeactivateNodeRequest(node_id=self.node_id))

    def pull(self) -> tuple[Message, flwr.ObjectTree] | None:
        """Return the next message's metadata and object tree, or None if there is no message."""
        with self._translate_errors():
            found = self._client.PullMessages(flwr.PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        return flwr.message_from_proto(found.messages_list[0]), found.message_object_trees[0]

    def app_of(self, run_id: int) -> str:
        """Return the id of the run's app."""
        with self._translate_errors():
            return self._client.GetRun(flwr.GetRunRequest(node=self._node, run_id=run_id)).run.fab_id

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        """Return one object of a message.

        Raises:
            ObjectUnavailableError: The server has not received it yet.
            ObjectPullError: The server does not know it.
        """
        with self._translate_errors():
            found = self._client.PullObject(flwr.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id))
        if not found.object_found:
            raise flwr.ObjectPullError(object_id, "the object could not be found.")
        if not found.object_available:
            raise flwr.ObjectUnavailableError(object_id)
        return found.object_content

    def confirm(self, run_id: int, object_id: str) -> None:
        """Confirm that a message has arrived completely, so that the server may delete it."""
        request = flwr.ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=object_id)
        with self._translate_errors():
            self._client.ConfirmMessageReceived(request)

    def push(self, head: Message, tree: flwr.ObjectTree, seconds: float) -> tuple[set[str], str]:
        """Announce a reply. Returns the objects that the server requests (none: it refuses the reply) and the upload session."""
        request = flwr.PushMessagesRequest(
            node=self._node, messages_list=[flwr.message_to_proto(head)], message_object_trees=[tree], clientapp_runtime_list=[seconds]
        )
        with self._translate_errors():
            response = self._client.PushMessages(request)
        return set(response.objects_to_push), response.session_id

    def push_object(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        """Send one object of a reply.

        Raises:
            ObjectPushError: The session has ended.
        """
        request = flwr.PushObjectRequest(node=self._node, run_id=run_id, object_id=object_id, object_content=content, session_id=session)
        with self._translate_errors():
            if not self._client.PushObject(request).stored:
                raise flwr.ObjectPushError(object_id, run_id, session)

    def close(self) -> None:
        self._client.close()

    @property
    def pace(self) -> float:
        """Seconds between two looks that the server asks for; 0 if it does not say."""
        return self._headers.pace

    @property
    def _node(self) -> flwr.NodeProto:
        return flwr.NodeProto(node_id=self.node_id)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Convert a call's exceptions to FleetError."""
        try:
            yield
        except httpx.HTTPStatusError as bad:
            raise self._status(bad.response) from None
        except httpx.HTTPError as bad:
            raise self._transport(bad) from None
        except (ValueError, RuntimeError, httpx.InvalidURL) as bad:  # not protobuf, or stop() closed the client
            raise Unreachable(f"{self.server} does not answer like a fedtune server: {bad}") from None

    def _transport(self, bad: httpx.HTTPError) -> FleetError:
        tls = _cause(bad, ssl.SSLError)
        if isinstance(tls, ssl.SSLCertVerificationError):
            return Unreachable(
                f"the certificate of {self.server} does not match {self._authority} ({tls.verify_message}):"
                " give the ca.pem from the same `fedtune keys` folder, and a host name that the certificate lists"
            )
        if tls is not None:
            return Unreachable(f"the TLS handshake with {self.server} failed ({tls.reason or tls}): it may not be a fedtune server")
        if isinstance(bad, httpx.ConnectError | httpx.ConnectTimeout):
            return Unreachable(f"cannot reach {self.server}: {str(bad) or 'no answer'}")
        if isinstance(bad, httpx.TimeoutException):
            return Unreachable(f"{self.server} does not answer in time")
        return Unreachable(f"the link to {self.server} broke{' (does it want TLS?)' if self._insecure else ''}: {bad}")

    def _status(self, response: httpx.Response) -> FleetError:
        status, error = response.status_code, flwr.FlowerError.from_json(response.text)
        code = error.code if error else None
        if status == 401:
            ahead = _clock_offset(response)
            if not -BEHIND < ahead < AHEAD:
                way = "ahead of" if ahead > 0 else "behind"
                return Unrecognized(
                    f"this machine's clock is {abs(ahead):.0f} s {way} that of {self.server}, which refuses the request: set the clock"
                )
            return Unrecognized(f"{self.server} does not know the key {self._key_name}: add its public key to the allowed keys there")
        if status == 409 and error is None:
            return KeyInUse(
                f"another process is connected to {self.server} with the key {self._key_name}: stop one of them, or give each its own key"
            )
        if code == flwr.ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            return RunEnded("the run has ended")
        if code in (flwr.ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, flwr.ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE):
            return NotActivated(
                f"{self.server} does not accept this client yet: its previous process holds the lease for up to {LEASE:.0f} s more,"
                f" or its key {self._key_name} is not allowed there"
            )
        reason = f"{error.message} {error.public_details or ''}".strip() if error else f"HTTP {status}"
        if status in (429, 502, 503, 504):
            return Unreachable(f"{self.server} cannot answer now: {reason}")
        if status >= 500:
            return ServerFailed(f"{self.server} failed: {reason}")
        return Refused(f"{self.server} refuses: {reason}")


def key_refused(key_name: str, server: str) -> Refused:
    """The error for a `NotActivated` that outlasts the lease."""
    return Refused(
        f"{server} does not accept the key {key_name}: it is not among the allowed keys there, or another client runs with a copy of it"
    )


def tls_context(root_certificates: Path | None) -> ssl.SSLContext:
    """Return a context that verifies servers with a CA file or the system's CAs.

    Raises:
        OSError: The file cannot be read or holds no certificates (ssl.SSLError).
    """
    return ssl.create_default_context(cafile=None if root_certificates is None else str(root_certificates))


def _cause(bad: BaseException, wanted: type[_Cause]) -> _Cause | None:
    """The first exception of a type among `bad` and its causes; None if there is none."""
    seen: BaseException | None = bad
    while seen is not None and not isinstance(seen, wanted):
        seen = seen.__cause__ or seen.__context__
    return seen


def _clock_offset(response: httpx.Response, clock: Callable[[], float] | None = None) -> float:
    """Seconds by which this machine's clock is ahead of the server's; 0 if the server sends no date."""
    try:
        return (clock or time.time)() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return 0.0

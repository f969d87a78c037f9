"""Calls to the server's Fleet API, and what can go wrong with them, in words.

Flower's own connection ends the process when the server refuses it; here every failure is a `Trouble` whose text is a sentence for the
operator, and what to do about it is for the caller to say.
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
from fedtune.network.lives import LIFE
from fedtune.network.pace import PACE, read_pace

LEASE = 60.0  # seconds that the server keeps a node's place after its last heartbeat: two of Flower's intervals
AHEAD, BEHIND = 5.0, 305.0  # seconds by which Flower lets a client's clock be off
_SLOW = httpx.Timeout(connect=5.0, read=20.0, write=20.0, pool=60.0)  # seconds of silence, not of the whole call


_Cause = TypeVar("_Cause", bound=BaseException)


class Trouble(Exception):
    """A call failed; the text is one sentence. `patience`: the longest pause before it is tried again, in seconds."""

    patience = 30.0


class Unreachable(Trouble):
    """The link or the server is down: the same call may succeed in a moment."""

    patience = 5.0


class Faulty(Unreachable):
    """The server failed on this call."""


class Unrecognized(Trouble):
    """The server does not know this node, or not by this key."""


class Occupied(Trouble):
    """The server does not activate the node: its former life's lease still runs, or its key is not allowed. Flower does not say which."""

    patience = 5.0


class Taken(Unrecognized):
    """Another process with the same key has the node's place."""


class Refused(Trouble):
    """The server will not do this, however often it is asked."""


class RunOver(Trouble):
    """The run that this is about does not take messages any more."""


class _Headers:
    """Says which Flower this is, and which process, and hears how often to look. Flower's own ends the process where the server minds."""

    pace = 0.0

    def __init__(self) -> None:
        self._headers = dict(flwr.RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
        self._headers[LIFE] = secrets.token_hex(16)

    def intercept(self, context: flwr.ProtobufRequestContext, call_next: flwr.ProtobufCall) -> httpx.Response:
        context.request.headers.update(self._headers)
        response = call_next(context)
        self.pace = read_pace(response.headers.get(PACE, ""))
        return response


class Fleet:
    """One node's calls. Safe to use from several threads.

    Args:
        server: HOST:PORT.
        tls: What to check the server with; None speaks plain HTTP.
        authority: Where `tls` is from, for the sentence when it does not fit.
        key: The node's identity.
        key_name: Where it is from, likewise.
    """

    node_id: int = 0  # what the server called it last; 0 before that

    def __init__(self, server: str, tls: ssl.SSLContext | None, authority: str, key: EllipticCurvePrivateKey, key_name: str) -> None:
        self.server, self._insecure, self._authority, self._key_name = server, tls is None, authority, key_name
        self._public_key = flwr.public_key_to_bytes(key.public_key())
        self._headers = _Headers()
        self._client = flwr.FleetHttpClient(
            f"{'http' if tls is None else 'https'}://{server}",
            interceptors=[self._headers, flwr.NodeAuthHttpInterceptor(key, key.public_key())],
            verify=tls or False,
            timeout=_SLOW,  # type: ignore[arg-type]  # handed on to httpx as it is
        )

    def join(self) -> None:
        """Hold the node's place for another lease; where the server does not know the node any more, take one.

        Raises:
            Trouble: There is no place now.
        """
        if self.node_id:
            try:
                with self._speaking():
                    beat = flwr.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=LEASE / 2)
                    if self._client.SendNodeHeartbeat(beat).success:
                        return
            except Unrecognized:
                pass  # another database, or another key's node
        if self._insecure:
            try:
                with self._speaking():
                    self._client.RegisterNode(flwr.RegisterNodeFleetRequest(public_key=self._public_key))
            except Occupied:
                pass  # it knows the key already
        with self._speaking():
            taken = self._client.ActivateNode(flwr.ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=LEASE / 2))
        self.node_id = taken.node_id

    def leave(self) -> None:
        """Give the place back, so that the next life gets it at once."""
        with self._speaking():
            self._client.DeactivateNode(flwr.DeactivateNodeRequest(node_id=self.node_id))

    def pull(self) -> tuple[Message, flwr.ObjectTree] | None:
        """The next message's head, and what it is made of; None where none waits."""
        with self._speaking():
            found = self._client.PullMessages(flwr.PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        return flwr.message_from_proto(found.messages_list[0]), found.message_object_trees[0]

    def app_of(self, run_id: int) -> str:
        """The id of the app that a run is of."""
        with self._speaking():
            return self._client.GetRun(flwr.GetRunRequest(node=self._node, run_id=run_id)).run.fab_id

    def pull_object(self, run_id: int, object_id: str) -> bytes:
        """A part of a message.

        Raises:
            ObjectUnavailableError: The server has not got it itself yet.
            ObjectPullError: The server does not know it.
        """
        with self._speaking():
            found = self._client.PullObject(flwr.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id))
        if not found.object_found:
            raise flwr.ObjectPullError(object_id, "the object could not be found.")
        if not found.object_available:
            raise flwr.ObjectUnavailableError(object_id)
        return found.object_content

    def confirm(self, run_id: int, object_id: str) -> None:
        """Say that all of a message is here, so that the server may forget it."""
        request = flwr.ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=object_id)
        with self._speaking():
            self._client.ConfirmMessageReceived(request)

    def push(self, head: Message, tree: flwr.ObjectTree, seconds: float) -> tuple[set[str], str]:
        """Announce a reply. Returns the parts that the server wants (none: it does not want the reply) and the session to send them in."""
        request = flwr.PushMessagesRequest(
            node=self._node, messages_list=[flwr.message_to_proto(head)], message_object_trees=[tree], clientapp_runtime_list=[seconds]
        )
        with self._speaking():
            said = self._client.PushMessages(request)
        return set(said.objects_to_push), said.session_id

    def push_object(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        """Send a part of a reply.

        Raises:
            ObjectPushError: The session is over.
        """
        request = flwr.PushObjectRequest(node=self._node, run_id=run_id, object_id=object_id, object_content=content, session_id=session)
        with self._speaking():
            if not self._client.PushObject(request).stored:
                raise flwr.ObjectPushError(object_id, run_id, session)

    def close(self) -> None:
        self._client.close()

    @property
    def pace(self) -> float:
        """Seconds between two looks that the server asks for; 0 where it does not say."""
        return self._headers.pace

    @property
    def _node(self) -> flwr.NodeProto:
        return flwr.NodeProto(node_id=self.node_id)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turn what a call may raise into Trouble."""
        try:
            yield
        except httpx.HTTPStatusError as bad:
            raise self._status(bad.response) from None
        except httpx.HTTPError as bad:
            raise self._transport(bad) from None
        except (ValueError, RuntimeError, httpx.InvalidURL) as bad:  # no protobuf; or the client was closed by stop()
            raise Unreachable(f"{self.server} does not answer as a fedtune server: {bad}") from None

    def _transport(self, bad: httpx.HTTPError) -> Trouble:
        tls = _cause(bad, ssl.SSLError)
        if isinstance(tls, ssl.SSLCertVerificationError):
            return Unreachable(
                f"the certificate of {self.server} does not fit {self._authority} ({tls.verify_message}):"
                " give the ca.pem that was made with it, and the host name that is in it"
            )
        if tls is not None:
            return Unreachable(f"{self.server} does not speak TLS as a fedtune server would ({tls.reason or tls})")
        if isinstance(bad, httpx.ConnectError | httpx.ConnectTimeout):
            return Unreachable(f"cannot reach {self.server}: {str(bad) or 'no answer'}")
        if isinstance(bad, httpx.TimeoutException):
            return Unreachable(f"{self.server} does not answer in time")
        return Unreachable(f"the link to {self.server} broke{' (does it want TLS?)' if self._insecure else ''}: {bad}")

    def _status(self, response: httpx.Response) -> Trouble:
        status, error = response.status_code, flwr.FlowerError.from_json(response.text)
        code = error.code if error else None
        if status == 401:
            ahead = _ahead(response)
            if not -BEHIND < ahead < AHEAD:
                way = "ahead of" if ahead > 0 else "behind"
                return Unrecognized(
                    f"this machine's clock is {abs(ahead):.0f} s {way} that of {self.server}, which refuses it: set the clock"
                )
            return Unrecognized(f"{self.server} does not know the key {self._key_name}: add its public half to the allowed keys there")
        if status == 409 and error is None:
            return Taken(
                f"another process is connected to {self.server} with the key {self._key_name}: stop one of them, or give each its own key"
            )
        if code == flwr.ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
            return RunOver("the run is over")
        if code in (flwr.ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, flwr.ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE):
            return Occupied(
                f"{self.server} does not let this client in yet: its former life has the place for up to {LEASE:.0f} s more,"
                f" or its key {self._key_name} is not allowed there"
            )
        said = f"{error.message} {error.public_details or ''}".strip() if error else f"HTTP {status}"
        if status in (429, 502, 503, 504):
            return Unreachable(f"{self.server} cannot answer now: {said}")
        if status >= 500:
            return Faulty(f"{self.server} failed: {said}")
        return Refused(f"{self.server} refuses: {said}")


def refused_key(key_name: str, server: str) -> Refused:
    """What an `Occupied` is that outlasts every lease."""
    return Refused(
        f"{server} does not accept the key {key_name}: it is not among the allowed keys there, or another client runs with a copy of it"
    )


def tls_context(root_certificates: Path | None) -> ssl.SSLContext:
    """Checks servers against a CA file, or against the system's CAs.

    Raises:
        OSError: The file cannot be read, or holds no certificates (ssl.SSLError).
    """
    return ssl.create_default_context(cafile=None if root_certificates is None else str(root_certificates))


def _cause(bad: BaseException, wanted: type[_Cause]) -> _Cause | None:
    """The first of a kind among an exception and its causes."""
    seen: BaseException | None = bad
    while seen is not None and not isinstance(seen, wanted):
        seen = seen.__cause__ or seen.__context__
    return seen


def _ahead(response: httpx.Response, clock: Callable[[], float] | None = None) -> float:
    """Seconds by which this machine's clock is ahead of the server's; 0 where the server does not say."""
    try:
        return (clock or time.time)() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return 0.0

"""The server's Grid over the private port. It waits for a SuperLink that restarts, polls cheaply and never blocks on a partial reply."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import httpx
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict

from fedtune.contracts import flower
from fedtune.errors import LinkLost, NetworkError
from fedtune.network import _flwr, _flwr_client
from fedtune.network.pack import pack, unpack

_RETRY_S = 0.2
_HEARTBEAT_S = 10.0  # Flower ends a run after 60 s of silence
_LOST_AFTER_S = 1.0  # a message must appear lost for this long before its error is fetched: a restarting node is briefly offline
_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)  # raised by Flower for malformed objects


class Link(Protocol):
    """The parts of the SuperLink's handle that the Grid uses."""

    @property
    def private_address(self) -> str: ...
    @property
    def failure(self) -> NetworkError | None: ...
    def ask(self, patience_s: float, **request: Any) -> dict[str, Any]: ...


class LinkGrid(_flwr.HttpGrid):
    """Flower's Grid on one run.

    Args:
        link: The SuperLink.
        run_id: The Flower run.
        token: Authenticates this process as the run's ServerApp.
        patience_s: Seconds to retry while the SuperLink does not answer.

    Every call raises `LinkLost` after that time or if Flower has ended the run, and `NetworkError` if the SuperLink refuses.
    """

    def __init__(self, link: Link, run_id: int, token: str, patience_s: float) -> None:
        super().__init__(link.private_address, insecure=True, token=token)
        self._link, self._patience_s = link, patience_s
        self._retry_invoker = _flwr.RetryInvoker(
            lambda: itertools.repeat(_RETRY_S),  # type: ignore[arg-type, return-value]
            (httpx.TransportError, httpx.HTTPStatusError),
            max_tries=None,
            max_time=patience_s,
            jitter=None,
            should_giveup=self._should_give_up,
        )
        self._lost_since: dict[str, float] = {}
        self._max_reply_bytes: dict[str, int] = {}  # message → limit of its reply, in bytes
        self._closed = threading.Event()
        flower.identify_process(run_id)
        self.set_run(_flwr.Run.create_empty(run_id))
        self._connect()
        self._heartbeat = threading.Thread(target=self._heartbeat_loop, name="heartbeat", daemon=True)
        self._heartbeat.start()

    def get_nodes(self) -> Iterable[Any]:
        with self._network_errors("list the connected nodes"):
            return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push one message at a time: a node polls for the objects of an announced message until all are uploaded."""
        known: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}
        ids: list[str] = []
        with self._network_errors("send messages"):
            for message in messages:
                ids += super().push_messages([pack(message, known)]) or [""]  # Flower gives no id to a message that is too large
        return ids

    def push_bounded(self, messages: Sequence[Message], most: Sequence[int]) -> Sequence[str]:
        """Send messages with a limit in bytes for each reply; a larger reply is refused before it is fetched."""
        ids = list(self.push_messages(messages))
        self._max_reply_bytes.update({i: size for i, size in zip(ids, most, strict=True) if i})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived completely, and Flower's errors for replies that never will."""
        due, replies = self._due(list(message_ids))
        for message in due:  # one at a time: a malformed reply must not lose the others
            try:
                with self._network_errors("fetch replies"):
                    replies += super().pull_messages([message])
            except _MALFORMED as bad:
                replies.append(self._refused(message, f"its reply cannot be read ({bad!r:.80})"))
        for reply in replies:
            self._lost_since.pop(reply.metadata.reply_to_message_id, None)
            self._max_reply_bytes.pop(reply.metadata.reply_to_message_id, None)
        return [_unpacked(reply) for reply in replies]

    def close(self) -> None:
        """Stop the heartbeat, so that Flower ends the run after its timeout, and disconnect."""
        self._closed.set()
        super().close()

    def _due(self, ids: list[str]) -> tuple[list[str], list[Message]]:
        """Return the message ids to pull, and refusals for replies that are too large."""
        if not ids:
            return [], []
        most = {i: self._max_reply_bytes[i] for i in ids if i in self._max_reply_bytes}
        found = self._link.ask(self._patience_s, do="arrived", ids=ids, most=most)
        now, lost = time.monotonic(), set(found["lost"])
        self._lost_since = {m: since for m, since in self._lost_since.items() if m in lost or m not in ids}
        given_up = {m for m in lost if now - self._lost_since.setdefault(m, now) >= _LOST_AFTER_S}
        due = [m for m in ids if m in given_up or m in found["complete"]]
        large = {m: f"its reply of {n / 1e6:.3g} MB exceeds the limit of {most[m] / 1e6:.3g} MB" for m, n in found["large"].items()}
        return due, [self._refused(m, why) for m, why in large.items()]

    def _refused(self, message: str, why: str) -> Message:
        """A reply that stands for a refused one."""
        node, run = self.node.node_id, self.run.run_id
        about = Metadata(run, "", node, node, message, "", time.time(), 0.0, "query")
        return _flwr_client.make_message(metadata=about, content=RecordDict({"declined": ConfigRecord({"kind": "refused", "why": why})}))

    def _should_give_up(self, error: Exception) -> bool:
        """Whether a retry is useless."""
        if self._closed.is_set() or self._link.failure is not None:
            return True
        return isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500

    @contextlib.contextmanager
    def _network_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as bad:
            status = bad.response.status_code
            if status in (401, 403):
                raise LinkLost(f"cannot {what}: Flower has ended the run; open a new one") from None
            raise NetworkError(f"cannot {what}: the SuperLink answers with HTTP {status}; see its log and check its disk space") from None
        except _flwr.ObjectPushError:  # an object was not stored: the disk is full, or the SuperLink died
            raise LinkLost(f"cannot {what}: the SuperLink did not store an object; see its log and check its disk space") from None
        except httpx.HTTPError as bad:
            why = self._link.failure or f"the SuperLink did not answer for {self._patience_s:g} s ({bad})"
            raise LinkLost(f"cannot {what}: {why}") from None

    def _heartbeat_loop(self) -> None:
        while not self._closed.wait(_HEARTBEAT_S):
            with contextlib.suppress(httpx.HTTPError, RuntimeError, ValueError):  # the owner's next call reports the error
                self._runtime_client.SendTaskHeartbeat(_flwr.SendTaskHeartbeatRequest())


def _unpacked(reply: Message) -> Message:
    """Unpack a reply; if that fails, return an error reply."""
    try:
        return unpack(reply)
    except ValueError as bad:
        return Message(metadata=reply.metadata, error=Error(code=_flwr_client.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=str(bad)))  # type: ignore[call-overload]

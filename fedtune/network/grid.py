"""The server's Grid over the private port: patient with a SuperLink that comes back, cheap to poll, never stuck on half a reply."""

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
_BEAT_S = 10.0  # Flower ends a run after 60 s of silence
_DOUBT_S = 1.0  # for which a message must seem lost before Flower is asked for its error: a node that starts anew is away for a moment
_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)  # what Flower raises where objects do not fit


class Link(Protocol):
    """What the Grid needs of the SuperLink's handle."""

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
        token: What proves that this process is its ServerApp.
        patience_s: Seconds to go on trying where the SuperLink does not answer.

    Every call raises `LinkLost` after that, and where Flower has ended the run; `NetworkError` where the SuperLink refuses.
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
            should_giveup=self._hopeless,
        )
        self._doubted: dict[str, float] = {}
        self._most: dict[str, int] = {}  # message → bytes that its reply may take
        self._closed = threading.Event()
        flower.identify_process(run_id)
        self.set_run(_flwr.Run.create_empty(run_id))
        self._connect()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()

    def get_nodes(self) -> Iterable[Any]:
        with self._in_words("ask who is there"):
            return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """One after the other: a node that has heard of a message asks for its parts again and again until they are here."""
        known: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}
        ids: list[str] = []
        with self._in_words("send messages"):
            for message in messages:
                ids += super().push_messages([pack(message, known)]) or [""]  # Flower gives no id to what is too large
        return ids

    def push_bounded(self, messages: Sequence[Message], most: Sequence[int]) -> Sequence[str]:
        """Send messages, of which no reply may be larger than so many bytes: a larger one is refused before it is fetched."""
        ids = list(self.push_messages(messages))
        self._most.update({i: size for i, size in zip(ids, most, strict=True) if i})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come with all their tensors, and Flower's errors for what never will."""
        due, replies = self._due(list(message_ids))
        for message in due:  # each alone: what cannot be put together costs nobody else's reply
            try:
                with self._in_words("fetch replies"):
                    replies += super().pull_messages([message])
            except _MALFORMED as bad:
                replies.append(self._refused(message, f"its reply cannot be read ({bad!r:.80})"))
        for reply in replies:
            self._doubted.pop(reply.metadata.reply_to_message_id, None)
            self._most.pop(reply.metadata.reply_to_message_id, None)
        return [_opened(reply) for reply in replies]

    def close(self) -> None:
        """Stop the heartbeat, so that Flower ends the run in its own time, and hang up."""
        self._closed.set()
        super().close()

    def _due(self, ids: list[str]) -> tuple[list[str], list[Message]]:
        """Those of the ids that are worth a pull, and refusals of replies that are too large for one."""
        if not ids:
            return [], []
        most = {i: self._most[i] for i in ids if i in self._most}
        found = self._link.ask(self._patience_s, do="arrived", ids=ids, most=most)
        now, lost = time.monotonic(), set(found["lost"])
        self._doubted = {m: since for m, since in self._doubted.items() if m in lost or m not in ids}
        given_up = {m for m in lost if now - self._doubted.setdefault(m, now) >= _DOUBT_S}
        due = [m for m in ids if m in given_up or m in found["complete"]]
        large = {
            m: f"its reply of {n / 1e6:.3g} MB is larger than the {most[m] / 1e6:.3g} MB that were asked for"
            for m, n in found["large"].items()
        }
        return due, [self._refused(m, why) for m, why in large.items()]

    def _refused(self, message: str, why: str) -> Message:
        """What stands for a reply that is not taken."""
        node, run = self.node.node_id, self.run.run_id
        about = Metadata(run, "", node, node, message, "", time.time(), 0.0, "query")
        return _flwr_client.make_message(metadata=about, content=RecordDict({"declined": ConfigRecord({"kind": "refused", "why": why})}))

    def _hopeless(self, error: Exception) -> bool:
        """Whether trying again is of no use."""
        if self._closed.is_set() or self._link.failure is not None:
            return True
        return isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500

    @contextlib.contextmanager
    def _in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as bad:
            status = bad.response.status_code
            if status in (401, 403):
                raise LinkLost(f"cannot {what}: Flower has ended the run; open a new one") from None
            raise NetworkError(
                f"cannot {what}: the SuperLink answers with HTTP {status}; see its log, and whether its disk is full"
            ) from None
        except _flwr.ObjectPushError:  # a part was not stored: a full disk, or an answer that a dying SuperLink did not give
            raise LinkLost(f"cannot {what}: the SuperLink did not keep a part; see its log, and whether its disk is full") from None
        except httpx.HTTPError as bad:
            why = self._link.failure or f"the SuperLink did not answer for {self._patience_s:g} s ({bad})"
            raise LinkLost(f"cannot {what}: {why}") from None

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_S):
            with contextlib.suppress(httpx.HTTPError, RuntimeError, ValueError):  # the next call of the owner says what is wrong
                self._runtime_client.SendTaskHeartbeat(_flwr.SendTaskHeartbeatRequest())


def _opened(reply: Message) -> Message:
    """A reply as its client wrote it; one that cannot be opened is that client's error."""
    try:
        return unpack(reply)
    except ValueError as bad:
        return Message(metadata=reply.metadata, error=Error(code=_flwr_client.ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=str(bad)))  # type: ignore[call-overload]

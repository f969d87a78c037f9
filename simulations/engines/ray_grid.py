"""Flower's Grid over workers that may die: Ray's, or any object with the same few calls.

The messages of a round are assigned to free workers in batches. Messages of a lost worker are assigned again, one at a time, so that a
client whose turn kills its worker does not affect others; after the third loss the client's reply is an error. A turn depends only on its
plan's seed, so it does not matter which worker runs it, or how often.
"""

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedtune.contracts import flower
from fedtune.errors import RunError
from fedtune.simulations.engines.grid import VirtualGrid

LARGEST = 32  # clients per batch: more replies would need too much memory in a worker
MAX_LOSSES = 3  # workers lost on one message before it is answered with an error
_WAIT_S, _SAY_S, _PATIENCE_S = 1.0, 30.0, 600.0


class WorkerGrid(VirtualGrid):
    """Runs all virtual clients on workers.

    Args:
        ray: The Ray module; uses `wait`, `get` and `exceptions`.
        add_worker: Number of workers → a new worker, or None if the cluster has no resources for another. Its `start` returns an error
            sentence or None; its `answer` takes messages and returns a content or an error for each.
        nodes: Number of clients.
        together: Whether a worker trains the clients of its batch at once; if not, it gets one turn at a time.
        note: Called with a sentence about each lost worker.
    """

    def __init__(
        self, ray: Any, add_worker: Callable[[int], Any | None], nodes: int, *, together: bool, note: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(nodes)
        self._ray, self._add_worker, self._together, self._note = ray, add_worker, together, note
        self._waiting: deque[Message] = deque()
        self._known: set[str] = set()  # ids of the messages that wait or are assigned
        self._starting: dict[Any, Any] = {}  # call → worker
        self._busy: dict[Any, tuple[Any, list[Message]]] = {}  # call → worker and its messages
        self._idle: list[Any] = []
        self._deaths: Counter[str] = Counter()
        self._ready: dict[str, Message] = {}
        self._unfit: list[tuple[Any, str]] = []
        self._alone_since: float | None = None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = [flower.stamp(m) for m in messages]
        self._waiting.extend(messages)
        self._known.update(ids)
        self._assign()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the available replies; waits up to one second if any is missing.

        Raises:
            RunError: No worker can start, or there has been none for ten minutes.
        """
        ids = list(message_ids)
        if any(i in self._known for i in ids):
            self._collect()
        return [self._ready.pop(i) for i in ids if i in self._ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("fedtune's bridge pushes and pulls")

    @property
    def workers(self) -> int:
        """Number of busy, idle and starting workers."""
        return len(self._starting) + len(self._busy) + len(self._idle)

    # -- assigning ------------------------------------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Assign messages to each free worker, and start more workers if the cluster has room."""
        while self._waiting and (worker := self._add_worker(self.workers + len(self._unfit))) is not None:
            self._starting[worker.start.remote()] = worker
        while self._waiting and self._idle:
            share = self._next_batch()
            worker = self._idle.pop()
            self._busy[worker.answer.remote(share)] = worker, share

    def _next_batch(self) -> list[Message]:
        """The next messages of one type, divided evenly among the workers, up to the limit."""
        kind = self._waiting[0].metadata.message_type
        same = list(itertools.takewhile(lambda m: m.metadata.message_type == kind and not self._died(m), self._waiting))
        takers = len(self._idle) + len(self._starting)
        size = min(LARGEST, math.ceil(len(same) / takers)) if self._together or kind.startswith("query") else 1
        return [self._waiting.popleft() for _ in range(max(1, size))]

    def _died(self, message: Message) -> bool:
        return self._deaths[message.metadata.message_id] > 0

    # -- collecting-----------------------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        self._assign()
        calls = [*self._starting, *self._busy]
        if not calls:
            self._idle_for_long()
            time.sleep(_WAIT_S / 10)
            return
        done, _ = self._ray.wait(calls, num_returns=1, timeout=_WAIT_S)
        if done:
            done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in done:
            if call in self._starting:
                self._started(self._starting.pop(call), call)
            else:
                self._answered(*self._busy.pop(call), call)
        if self._busy or self._idle:
            self._alone_since = None
        else:
            self._idle_for_long()
        self._assign()

    def _started(self, worker: Any, call: Any) -> None:
        try:
            wrong = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as bad:
            wrong = f"a worker cannot start ({_cause(bad)})"
        except self._ray.exceptions.RayError as bad:
            self._note(f"a worker was lost while it loaded ({type(bad).__name__})")
            return
        if wrong is None:
            self._idle.append(worker)
            return
        if wrong not in (error for _, error in self._unfit):
            self._note(wrong)
        self._unfit.append((worker, wrong))  # it keeps its resources: another worker on this machine would fail too
        if not self.workers:
            raise RunError(wrong)

    def _answered(self, worker: Any, share: list[Message], call: Any) -> None:
        try:
            answers: Sequence[RecordDict | Error] = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as bad:  # the worker is still alive
            answers = [Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=_cause(bad)) for _ in share]
        except self._ray.exceptions.RayError as bad:
            self._lost(share, type(bad).__name__)
            return
        self._idle.append(worker)
        for message, answer in zip(share, answers, strict=True):
            self._reply(message, answer)

    def _lost(self, share: list[Message], why: str) -> None:
        again = []
        for message in share:
            i = message.metadata.message_id
            self._deaths[i] += 1
            if self._deaths[i] >= MAX_LOSSES:
                reason = f"{MAX_LOSSES} workers were lost in this client's turn, perhaps out of memory"
                self._reply(message, Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=reason))
            else:
                again.append(message)
        self._waiting.extendleft(reversed(again))
        self._note(
            f"a worker was lost ({why}): {len(again)} of its {len(share)} messages are assigned again, {self.workers} workers are left"
        )

    def _reply(self, message: Message, answer: RecordDict | Error) -> None:
        i = message.metadata.message_id
        self._known.discard(i)
        self._deaths.pop(i, None)
        self._ready[i] = Message(answer, reply_to=message)

    def _idle_for_long(self) -> None:
        now = time.monotonic()
        if self._alone_since is None:
            self._alone_since, self._said_at = now, now
        if now - self._alone_since > _PATIENCE_S:
            raise RunError(f"there has been no Ray worker for {_PATIENCE_S:.0f} s: see `ray status`, then continue with resume=RUN")
        if now - self._said_at > _SAY_S:
            self._said_at = now
            self._note(f"there is no Ray worker after {now - self._alone_since:.0f} s: `ray status` shows the cluster's free resources")


def _cause(bad: Any) -> str:
    cause = getattr(bad, "cause", None) or bad
    return f"{type(cause).__name__}: {str(cause)[:500]}"

"""Flower's Grid over workers that may die: Ray's, or whatever has the same few calls.

The messages of a round are dealt out in shares, to workers that are free. What a lost worker had is dealt out again, one message at a time,
so that a client whose turn kills its worker takes nobody with it; at the third loss the client's reply is an error. Turns hang on their
plan's seed alone, so it does not matter which worker takes them, or how often.
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

LARGEST = 32  # clients of a share: with more, a worker's replies would need too much memory at once
DEATHS = 3  # workers that a message may cost
_WAIT_S, _SAY_S, _PATIENCE_S = 1.0, 30.0, 600.0


class WorkerGrid(VirtualGrid):
    """All of them with workers.

    Args:
        ray: The module: `wait`, `get` and `exceptions` are used.
        hire: A new worker; None where the cluster has no place for one more than so many. Its `start` tells what is wrong with it in a
            sentence, or None; its `answer` takes messages and gives a content or an error for each.
        nodes: How many clients there are.
        together: Whether a worker trains its share's clients at once; if not, it gets one turn at a time.
        note: Who is told of workers that are lost.
    """

    def __init__(
        self, ray: Any, hire: Callable[[int], Any | None], nodes: int, *, together: bool, note: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(nodes)
        self._ray, self._hire, self._together, self._note = ray, hire, together, note
        self._waiting: deque[Message] = deque()
        self._known: set[str] = set()  # ids of the messages that wait or are with a worker
        self._starting: dict[Any, Any] = {}  # call → worker
        self._busy: dict[Any, tuple[Any, list[Message]]] = {}  # call → worker and its share
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
        self._deal()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there, after at most a second's wait for one that is not.

        Raises:
            RunError: No worker can start, or none has come back for ten minutes.
        """
        ids = list(message_ids)
        if any(i in self._known for i in ids):
            self._collect()
        return [self._ready.pop(i) for i in ids if i in self._ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("fedtune's bridge pushes and pulls")

    @property
    def workers(self) -> int:
        """Those that work, wait or load."""
        return len(self._starting) + len(self._busy) + len(self._idle)

    # -- dealing out ----------------------------------------------------------------------------------------------------------------------

    def _deal(self) -> None:
        """Give each free worker a share, and ask for more workers where the cluster has a place for them."""
        while self._waiting and (worker := self._hire(self.workers + len(self._unfit))) is not None:
            self._starting[worker.start.remote()] = worker
        while self._waiting and self._idle:
            share = self._share()
            worker = self._idle.pop()
            self._busy[worker.answer.remote(share)] = worker, share

    def _share(self) -> list[Message]:
        """The next messages of one type, as many as make like shares, none too large."""
        kind = self._waiting[0].metadata.message_type
        same = list(itertools.takewhile(lambda m: m.metadata.message_type == kind and not self._died(m), self._waiting))
        takers = len(self._idle) + len(self._starting)
        size = min(LARGEST, math.ceil(len(same) / takers)) if self._together or kind.startswith("query") else 1
        return [self._waiting.popleft() for _ in range(max(1, size))]

    def _died(self, message: Message) -> bool:
        return self._deaths[message.metadata.message_id] > 0

    # -- taking in ------------------------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        self._deal()
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
        self._deal()

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
        if wrong not in (said for _, said in self._unfit):
            self._note(wrong)
        self._unfit.append((worker, wrong))  # it keeps its place: the next on this machine would lack the same
        if not self.workers:
            raise RunError(wrong)

    def _answered(self, worker: Any, share: list[Message], call: Any) -> None:
        try:
            answers: Sequence[RecordDict | Error] = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as bad:  # the worker lives
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
            if self._deaths[i] >= DEATHS:
                reason = f"{DEATHS} workers were lost in this client's turn, such as for want of memory"
                self._reply(message, Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=reason))
            else:
                again.append(message)
        self._waiting.extendleft(reversed(again))
        self._note(f"a worker was lost ({why}): {len(again)} of its {len(share)} messages go to others, {self.workers} workers are left")

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
            raise RunError(f"no Ray worker has been there for {_PATIENCE_S:.0f} s: see what `ray status` says, then go on with resume=RUN")
        if now - self._said_at > _SAY_S:
            self._said_at = now
            self._note(f"no Ray worker is there yet, after {now - self._alone_since:.0f} s: `ray status` tells what the cluster has free")


def _cause(bad: Any) -> str:
    cause = getattr(bad, "cause", None) or bad
    return f"{type(cause).__name__}: {str(cause)[:500]}"

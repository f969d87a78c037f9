"""Iteration-level batching: requests join and leave between passes of the decoder.

A pass carries one row for every sequence that decodes, and fills up with prompts in chunks, so that a long prompt stalls nobody. A
sequence is nothing but its tokens and how many of them its cache holds: one that had to give up its blocks is computed again from its
tokens and goes on where it was.

Source: Yu et al. 2022, Orca (OSDI), §3.1; Kwon et al. 2023, vLLM, arXiv:2309.06180, §4.5; Agrawal et al. 2023, Sarathi, arXiv:2308.16369.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedtune.errors import ConfigError
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.jobs import Busy, End, Job, Output, Stopping
from fedtune.inference.engine.sample import Sampler
from fedtune.inference.engine.text import StopStrings, Stream, Text

_log = logging.getLogger("fedtune.inference")


class Decodes(Protocol):
    """What the scheduler needs of a decoder."""

    def forward(self, ids: Tensor, spans: Sequence[Span]) -> Tensor: ...


class Caches(Protocol):
    """Where sequences get their caches from; a paged pool, or one buffer each."""

    limit: int  # most tokens of one sequence

    def open(self, ids: Sequence[int], adapter: str | None) -> Cache | None:
        """A cache with room for ids, which may hold a beginning of them already, never all; None: no room now."""
        ...

    def reserve(self, cache: Cache, n: int) -> bool:
        """Room for n more tokens; False: there is none now."""
        ...

    def close(self, cache: Cache, ids: Sequence[int], adapter: str | None) -> None:
        """The sequence has ended, or gives its room to others; ids are the tokens that the cache holds, for others to begin with."""
        ...


class _Sequence:
    def __init__(self, job: Job, text: Text, vocabulary: int, virtual: int) -> None:
        self.job, self.virtual = job, virtual
        self.tokens = list(job.ids)
        self.cache: Cache | None = None
        self.sampler = Sampler(job.sampling, job.ids, vocabulary)
        self.stream, self.stops = Stream(text, job.ids if job.joins else ()), StopStrings(job.sampling.stop)

    @property
    def held(self) -> int:
        assert self.cache is not None
        return self.cache.length - self.virtual

    @property
    def pending(self) -> int:
        """Tokens that no pass has seen."""
        return len(self.tokens) - self.held


class Scheduler:
    """Answers many requests by one decoder; `step` is one pass, `run` a thread's life.

    Args:
        decoder: Of the model.
        text: Its tokenizer.
        caches: Where the sequences' caches come from.
        vocabulary: Width of the logits.

    Other arguments:
        max_running: Sequences in one pass.
        max_waiting: Requests that may wait for a place; one more is refused.
        rows: Tokens of a pass, decoding ones first.
        virtual: Entries of a cache that are no tokens of a text (a tuned prompt); a cache that has them shares nothing.
        begin: Puts them into a fresh cache.

    Attributes:
        passes: So far.
        preempted: How often a sequence gave up its blocks so far.
    """

    def __init__(
        self,
        decoder: Decodes,
        text: Text,
        caches: Caches,
        vocabulary: int,
        *,
        max_running: int = 16,
        max_waiting: int = 64,
        rows: int = 128,
        virtual: int = 0,
        begin: Callable[[Cache], None] = lambda cache: None,
    ) -> None:
        if max_running < 1 or max_waiting < 0:
            raise ConfigError(f"{max_running} requests at once and {max_waiting} waiting are impossible: at least 1 and 0 are needed")
        self._decoder, self._text, self._caches, self._vocabulary = decoder, text, caches, vocabulary
        self._virtual, self._begin = virtual, begin
        self._max_running, self._max_waiting, self._rows = max_running, max_waiting, max(rows, max_running)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # in the order of their admission
        self._lock = threading.Condition()
        self._draining = self._closed = False
        self.passes = self.preempted = 0

    @property
    def limit(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self._caches.limit - self._virtual

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        with self._lock:  # one that gives up its blocks is never neither
            return len(self._running), len(self._waiting)

    @property
    def full(self) -> bool:
        return sum(self.load) >= self._max_running + self._max_waiting

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, job: Job) -> None:
        """Take a request.

        Raises:
            Stopping: After `drain`.
            Busy: The queue is full.
            ConfigError: The prompt and the answer do not fit, or the prompt holds what is no token.
        """
        if not all(0 <= token < self._vocabulary for token in job.ids):
            raise ConfigError(f"the prompt holds a token that is none: they go from 0 to {self._vocabulary - 1}")
        if not 0 < len(job.ids) <= self.limit - job.max_new_tokens or job.max_new_tokens < 1:
            raise ConfigError(
                f"the prompt's {len(job.ids)} tokens and {job.max_new_tokens} new ones do not fit: at most {self.limit} together, "
                "and at least one of each"
            )
        sequence = _Sequence(job, self._text, self._vocabulary, self._virtual)
        with self._lock:
            if self._draining:
                raise Stopping("the server is stopping: ask again when it is back")
            if self.full:
                raise Busy(f"{sum(self.load)} requests are under way or waiting, and no more may: ask again later")
            self._waiting.append(sequence)
            self._lock.notify()

    def cancel(self, job: Job) -> None:
        """Forget a request, at once where it waits and before the next pass where it runs; it hears nothing more."""
        job.cancelled = True
        with self._lock:
            for sequence in self._waiting:
                if sequence.job is job:
                    self._waiting.remove(sequence)
                    break

    def drain(self) -> None:
        """Take no new requests; those that were taken go on."""
        with self._lock:
            self._draining = True

    def close(self) -> None:
        """End the thread, and every answer that is still under way with "stopping"."""
        with self._lock:
            self._draining = self._closed = True
            self._lock.notify()

    def run(self) -> None:
        """Pass after pass until `close`."""
        while True:
            with self._lock:
                while not (self._running or self._waiting or self._closed):
                    self._lock.wait()
                if self._closed:
                    break
            try:
                if not self.step():
                    time.sleep(0.001)  # all that wait are out of room until somebody cancels or time runs out
            except Exception:  # a bug must not take the server down
                _log.exception("a pass over %d sequences failed", len(self._running))
                for sequence in [*self._running, *self._take_waiting()]:
                    self._end(sequence, "failed")
        for sequence in [*self._running, *self._take_waiting()]:
            self._end(sequence, "stopping")

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass; False where there was nothing to do."""
        self._forget()
        self._admit()
        plan = self._plan()
        if not plan:
            return False
        ids = [sequence.tokens[sequence.held : sequence.held + n] for sequence, n in plan]
        spans = [Span(s.cache, n, keep=int(n == s.pending), adapter=s.job.adapter) for s, n in plan]  # type: ignore[arg-type]
        due = [s for s, n in plan if n == s.pending]
        logits = self._decoder.forward(torch.tensor([i for part in ids for i in part]), spans)
        self.passes += 1
        for sequence, row in zip(due, logits, strict=True):
            try:
                self._decide(sequence, row)
            except Exception:  # of one request: the others have done nothing
                _log.exception("the next token of a request cannot be chosen")
                self._end(sequence, "failed")
        return True

    def _take_waiting(self) -> list[_Sequence]:
        with self._lock:
            out = list(self._waiting)
            self._waiting.clear()
            return out

    def _forget(self) -> None:
        """Whoever has gone or run out of time."""
        now = time.monotonic()
        for sequence in list(self._running):
            if sequence.job.cancelled or sequence.job.deadline <= now:
                self._end(sequence, "timeout")
        with self._lock:
            late = [s for s in self._waiting if s.job.cancelled or s.job.deadline <= now]
            for sequence in late:
                self._waiting.remove(sequence)
        for sequence in late:
            self._end(sequence, "timeout")

    def _admit(self) -> None:
        """First come, first served: nobody overtakes one for whom there is no room."""
        while len(self._running) < self._max_running:
            with self._lock:
                if not self._waiting:
                    return
                sequence = self._waiting[0]
                cache = self._caches.open(sequence.tokens, sequence.job.adapter)
                if cache is None:
                    return
                self._waiting.popleft()
                sequence.cache = cache
                self._running.append(sequence)
            if self._virtual:
                self._begin(cache)
            if not sequence.job.answered:
                sequence.job.cached = sequence.held

    def _plan(self) -> list[tuple[_Sequence, int]]:
        """Who gets how many rows of the next pass: those that decode, then prompts, both in the order of arrival."""
        plan: dict[_Sequence, int] = {}
        left = self._rows
        for sequence in sorted(self._running, key=lambda s: s.pending > 1):
            if sequence.cache is None or not left:
                continue
            n = min(sequence.pending, left)
            while not self._caches.reserve(sequence.cache, n):
                youngest = self._running[-1]
                left += plan.pop(youngest, 0)
                self._preempt(youngest)
                if youngest is sequence:
                    break
            else:
                plan[sequence] = n
                left -= n
        return list(plan.items())

    def _preempt(self, sequence: _Sequence) -> None:
        """Its room for others; it comes back first, and computes its tokens again."""
        self.preempted += 1
        with self._lock:
            self._leave(sequence)
            self._waiting.appendleft(sequence)

    def _leave(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        cache, sequence.cache = sequence.cache, None
        assert cache is not None
        self._caches.close(cache, sequence.tokens[: cache.length - self._virtual], sequence.job.adapter)

    def _decide(self, sequence: _Sequence, logits: Tensor) -> None:
        """The sequence's next token, from logits [V]."""
        job = sequence.job
        token = sequence.sampler.next(logits)
        if token >= len(logits) or not math.isfinite(logits[token]):  # what nan makes of a draw must not reach the next pass
            raise ArithmeticError("the model's logits are not finite")
        sequence.sampler.take(token)
        sequence.tokens.append(token)
        job.answered += 1
        logprob, rivals = None, ()
        if job.rivals is not None:
            logs = logits.float().log_softmax(-1)
            best = logs.topk(min(job.rivals, len(logs)))
            logprob, rivals = float(logs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        if token in self._text.ends:
            return self._end(sequence, "stop", Output("", token, logprob, rivals))
        text = sequence.stops.push(sequence.stream.push(token))
        out = Output(text, token, logprob, rivals)
        if sequence.stops.stopped:
            self._end(sequence, "stop", out)
        elif job.answered >= job.max_new_tokens:
            self._end(sequence, "length", out)
        elif text or logprob is not None:
            self._deliver(job, out)

    def _end(self, sequence: _Sequence, why: End, last: Output | None = None) -> None:
        """Let go of a sequence; what was held back of its text goes out with the last piece."""
        if sequence.cache is not None:
            self._leave(sequence)
        last = last or Output("")
        text = last.text
        if not sequence.stops.stopped:
            text += sequence.stops.push(sequence.stream.finish())
            if sequence.stops.stopped:
                why = "stop"
            text += sequence.stops.finish()
        self._deliver(sequence.job, Output(text, last.token, last.logprob, last.rivals, why))

    def _deliver(self, job: Job, out: Output) -> None:
        if job.cancelled:
            return
        try:
            job.deliver(out)
        except Exception:  # whoever listened has gone without a word
            job.cancelled = True

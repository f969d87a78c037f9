"""Iteration-level batching: requests join and leave between passes of the decoder.

A pass has one row per decoding sequence and is filled up with chunks of prompts, so that a long prompt delays no other request. A
sequence's state is its tokens and the number of them in its cache: a preempted one is recomputed from its tokens and continues.

Source: Yu et al. 2022, Orca (OSDI), §3.1; Kwon et al. 2023, vLLM, arXiv:2309.06180, §4.5; Agrawal et al. 2023, Sarathi, arXiv:2308.16369.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from fedtune.errors import ConfigError
from fedtune.inference.engine.caches.base import Cache, Span
from fedtune.inference.engine.requests import Busy, End, GenerationRequest, Output, Stopping
from fedtune.inference.engine.sample import Sampler, rate
from fedtune.inference.engine.speculate.batch import BatchAdapt, SequenceDrafts
from fedtune.inference.engine.text import StopStrings, Stream, Text

_log = logging.getLogger("fedtune.inference")


class Decodes(Protocol):
    """The parts of a decoder that the scheduler uses."""

    def forward(self, ids: Any, spans: Sequence[Span]) -> Any:
        """As `Decoder.forward`; the scheduler reads the logits as an array."""
        ...


class Caches(Protocol):
    """Provides the caches of sequences: a paged pool, or one buffer each."""

    limit: int  # maximum number of tokens of one sequence

    def open(self, ids: Sequence[int], adapter: str | None) -> Cache | None:
        """Open a cache with room for ids. It may already hold a prefix of them, but never all. None if there is no room now."""
        ...

    def reserve(self, cache: Cache, n: int) -> bool:
        """Reserve room for n more tokens. Returns False if there is none now."""
        ...

    def close(self, cache: Cache, ids: Sequence[int], adapter: str | None) -> None:
        """Close the cache of an ended or preempted sequence; ids are its tokens, which other sequences may reuse as a prefix."""
        ...


class _Sequence:
    def __init__(self, request: GenerationRequest, text: Text, vocabulary: int, virtual: int, adapt: BatchAdapt) -> None:
        self.request, self.virtual = request, virtual
        self.tokens = list(request.ids)
        self.cache: Cache | None = None
        self.sampler = Sampler(request.sampling, request.ids, vocabulary)
        self.stream, self.stops = Stream(text, request.ids if request.joins else ()), StopStrings(request.sampling.stop)
        self.drafts, self.drafted = SequenceDrafts(adapt.acceptance), list[int]()  # the draft tokens of the next pass

    @property
    def held(self) -> int:
        assert self.cache is not None
        return self.cache.length - self.virtual

    @property
    def pending(self) -> int:
        """Number of tokens that are not in the cache."""
        return len(self.tokens) - self.held


class Scheduler:
    """Answers many requests with one decoder; `step` is one pass, `run` the thread's main loop.

    Args:
        decoder: The model's decoder.
        text: Its tokenizer.
        caches: Provides the sequences' caches.
        vocabulary: Width of the logits.

    Other arguments:
        max_running: Maximum number of sequences in a pass.
        max_waiting: Maximum number of waiting requests; more are refused.
        rows: Tokens per pass, decoding ones first.
        virtual: Number of virtual tokens in a cache (a tuned prompt); caches with them share no prefix.
        begin: Puts the virtual tokens into a new cache.
        speculates: Whether passes without prompts also verify draft tokens, while that is faster. Answers stay the same if a row's logits
            do not depend on other rows, as in native code.

    Attributes:
        passes: Number of passes so far.
        drafted, accepted: Draft tokens that were verified, and accepted.
        preempted: Number of preemptions so far.
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
        speculates: bool = False,
    ) -> None:
        if max_running < 1 or max_waiting < 0:
            raise ConfigError(f"max_running={max_running} must be at least 1 and max_waiting={max_waiting} at least 0")
        self._decoder, self._text, self._caches, self._vocabulary = decoder, text, caches, vocabulary
        self._virtual, self._begin = virtual, begin
        self._max_running, self._max_waiting, self._rows = max_running, max_waiting, max(rows, max_running)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # in order of admission
        self._lock = threading.Condition()
        self._draining = self._closed = False
        self._adapt, self._speculates = BatchAdapt(), speculates
        self.passes = self.preempted = self.drafted = self.accepted = 0

    @property
    def limit(self) -> int:
        """Maximum number of tokens of a prompt with its answer."""
        return self._caches.limit - self._virtual

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of running and of waiting requests."""
        with self._lock:  # a sequence being preempted is always in one of the two
            return len(self._running), len(self._waiting)

    @property
    def full(self) -> bool:
        return sum(self.load) >= self._max_running + self._max_waiting

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            Stopping: After `drain`.
            Busy: The queue is full.
            ConfigError: The prompt and the answer do not fit, or a token id is out of range.
        """
        if wrong := [token for token in request.ids if not 0 <= token < self._vocabulary]:
            raise ConfigError(f"token id {wrong[0]} in the prompt is out of range: valid ids are 0 to {self._vocabulary - 1}")
        if not 0 < len(request.ids) <= self.limit - request.max_new_tokens or request.max_new_tokens < 1:
            raise ConfigError(
                f"the prompt's {len(request.ids)} tokens and {request.max_new_tokens} new tokens do not fit: wanted at least one of each"
                f" and at most {self.limit} together"
            )
        sequence = _Sequence(request, self._text, self._vocabulary, self._virtual, self._adapt)
        with self._lock:
            if self._draining:
                raise Stopping("the server is shutting down: retry when it is back")
            if self.full:
                raise Busy(f"{sum(self.load)} requests are running or waiting, the maximum: retry later")
            self._waiting.append(sequence)
            self._lock.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Cancel a request: at once if it waits, before the next pass if it runs. It gets no more outputs."""
        request.canceled = True
        with self._lock:
            for sequence in self._waiting:
                if sequence.request is request:
                    self._waiting.remove(sequence)
                    break

    def drain(self) -> None:
        """Accept no new requests; finish the accepted ones."""
        with self._lock:
            self._draining = True

    def close(self) -> None:
        """Stop the thread; running and waiting requests end with "stopping"."""
        with self._lock:
            self._draining = self._closed = True
            self._lock.notify()

    def run(self) -> None:
        """Run passes until `close`."""
        while True:
            with self._lock:
                while not (self._running or self._waiting or self._closed):
                    self._lock.wait()
                if self._closed:
                    break
            try:
                if not self.step():
                    time.sleep(0.001)  # no waiting request has room until another is canceled or times out
            except Exception:  # a bug must not stop the server
                _log.exception("a pass over %d sequences failed", len(self._running))
                for sequence in [*self._running, *self._take_waiting()]:
                    self._end(sequence, "failed")
        for sequence in [*self._running, *self._take_waiting()]:
            self._end(sequence, "stopping")

    def step(self) -> bool:
        """Run one pass. Returns False if there was nothing to do."""
        self._forget()
        self._admit()
        plan = self._plan()
        if not plan:
            return False
        begun, decodes = time.perf_counter(), all(n == s.pending == 1 for s, n in plan)
        if decodes and self._speculates:
            self._draft([s for s, _ in plan])
        ids, spans, due = list[int](), list[Span](), list[tuple[_Sequence, int]]()
        for s, n in plan:
            assert s.cache is not None
            ids += [*s.tokens[s.held : s.held + n], *s.drafted]
            keep = 1 + len(s.drafted) if n == s.pending else 0
            spans.append(Span(s.cache, n + len(s.drafted), keep=keep, adapter=s.request.adapter))
            due += [(s, keep)] if keep else []
        logits = self._decoder.forward(ids, spans)
        self.passes += 1
        ends = accumulate(keep for _, keep in due)
        for (sequence, keep), end in zip(due, ends, strict=True):
            try:
                self._decide_all(sequence, logits[end - keep : end])
            except Exception:  # an error of one request must not affect the others
                _log.exception("the next token of a request cannot be chosen")
                self._end(sequence, "failed")
        if decodes and self._speculates:
            self._adapt.ran(len(ids), time.perf_counter() - begun)
        return True

    def _take_waiting(self) -> list[_Sequence]:
        with self._lock:
            out = list(self._waiting)
            self._waiting.clear()
            return out

    def _forget(self) -> None:
        """Remove canceled and timed-out requests."""
        now = time.monotonic()
        for sequence in list(self._running):
            if sequence.request.canceled or sequence.request.deadline <= now:
                self._end(sequence, "timeout")
        with self._lock:
            late = [s for s in self._waiting if s.request.canceled or s.request.deadline <= now]
            for sequence in late:
                self._waiting.remove(sequence)
        for sequence in late:
            self._end(sequence, "timeout")

    def _admit(self) -> None:
        """Admit waiting requests in order; none overtakes one without room."""
        while len(self._running) < self._max_running:
            with self._lock:
                if not self._waiting:
                    return
                sequence = self._waiting[0]
                cache = self._caches.open(sequence.tokens, sequence.request.adapter)
                if cache is None:
                    return
                self._waiting.popleft()
                sequence.cache = cache
                self._running.append(sequence)
            if self._virtual:
                self._begin(cache)
            if not sequence.request.answered:
                sequence.request.cached = sequence.held

    def _plan(self) -> list[tuple[_Sequence, int]]:
        """Assign the rows of the next pass: decoding sequences first, then prompts, both in order of arrival."""
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

    def _draft(self, sequences: Sequence[_Sequence]) -> None:
        """Give the sequences of a pass their draft tokens, as far as there is room."""
        for s, count in zip(sequences, self._adapt.counts([s.drafts.acceptance(s.tokens) for s in sequences]), strict=True):
            assert s.cache is not None
            room = min(s.request.max_new_tokens - s.request.answered - 1, self.limit - len(s.tokens))
            count = max(0, min(count, room, room if s.cache.undo is None else s.cache.undo - 1))
            if count and self._caches.reserve(s.cache, 1 + count):
                s.drafted = s.drafts.draft(s.tokens, count)
            else:
                s.drafts.saw(0, 0)

    def _preempt(self, sequence: _Sequence) -> None:
        """Free a sequence's cache for others. It is queued first, and its tokens will be recomputed."""
        self.preempted += 1
        with self._lock:
            self._leave(sequence)
            self._waiting.appendleft(sequence)

    def _leave(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        cache, sequence.cache = sequence.cache, None
        assert cache is not None
        if cache.length > (end := self._virtual + len(sequence.tokens)):  # draft tokens after the end
            cache.crop(end)
        self._caches.close(cache, sequence.tokens[: cache.length - self._virtual], sequence.request.adapter)

    def _decide_all(self, sequence: _Sequence, logits: np.ndarray) -> None:
        """Choose the sequence's next tokens from logits [1 + drafted, V]: those of plain decoding, as long as the draft has them."""
        drafted, sequence.drafted = sequence.drafted, []
        chosen = list[int]()
        for row, draft in zip(logits, [*drafted, None], strict=True):
            chosen.append(sequence.sampler.next(row))
            sequence.sampler.take(chosen[-1])
            if chosen[-1] != draft:
                break
        if drafted:
            assert sequence.cache is not None
            sequence.cache.crop(sequence.cache.length - len(drafted) + len(chosen) - 1)
            sequence.drafts.saw(len(drafted), len(chosen) - 1)
            self.drafted, self.accepted = self.drafted + len(drafted), self.accepted + len(chosen) - 1
        for token, row in zip(chosen, logits, strict=False):
            self._add(sequence, token, row)
            if sequence.cache is None:  # it has ended
                return

    def _decide(self, sequence: _Sequence, logits: np.ndarray) -> None:
        """Choose the sequence's next token from logits [V]."""
        self._decide_all(sequence, logits[None])

    def _add(self, sequence: _Sequence, token: int, logits: np.ndarray) -> None:
        """Append a token, which was chosen from logits [V]."""
        request = sequence.request
        sequence.tokens.append(token)
        request.answered += 1
        logprob, rivals = None, ()
        if request.rivals is not None:
            logprob, rivals = rate(logits, token, request.rivals)
        if token in self._text.ends:
            return self._end(sequence, "stop", Output("", token, logprob, rivals))
        text = sequence.stops.push(sequence.stream.push(token))
        out = Output(text, token, logprob, rivals)
        if sequence.stops.stopped:
            self._end(sequence, "stop", out)
        elif request.answered >= request.max_new_tokens:
            self._end(sequence, "length", out)
        elif text or logprob is not None:
            self._deliver(request, out)

    def _end(self, sequence: _Sequence, why: End, last: Output | None = None) -> None:
        """Finish a sequence; text that was held back is sent with the last output."""
        if sequence.cache is not None:
            self._leave(sequence)
        last = last or Output("")
        text = last.text
        if not sequence.stops.stopped:
            text += sequence.stops.push(sequence.stream.finish())
            if sequence.stops.stopped:
                why = "stop"
            text += sequence.stops.finish()
        self._deliver(sequence.request, Output(text, last.token, last.logprob, last.rivals, why))

    def _deliver(self, request: GenerationRequest, out: Output) -> None:
        if request.canceled:
            return
        try:
            request.deliver(out)
        except Exception:  # the receiver is gone
            request.canceled = True

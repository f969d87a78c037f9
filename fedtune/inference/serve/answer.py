"""A running request in the event loop: answered as a whole or as a stream, and canceled when its client disconnects."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fedtune.errors import ConfigError
from fedtune.inference.engine.requests import Busy, GenerationRequest, Output, Stopping
from fedtune.inference.serve.formats import ResponseFormatter, event, usage
from fedtune.inference.serve.limits import until_disconnect
from fedtune.inference.serve.logprobs import LogprobFormatter
from fedtune.inference.serve.refusal import Refused

RETRY_S = 1
PATIENCE_S = 5.0  # seconds beyond the request's timeout, so that the scheduler's clearer error comes first
GONE = 499  # status for a client that has disconnected
_log = logging.getLogger("fedtune.serve")


class Schedules(Protocol):
    """The parts of a `Scheduler` that the application uses."""

    passes: int
    preempted: int

    @property
    def limit(self) -> int: ...
    @property
    def load(self) -> tuple[int, int]: ...
    @property
    def full(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    def submit(self, request: GenerationRequest) -> None: ...
    def cancel(self, request: GenerationRequest) -> None: ...


def require_capacity(scheduler: Schedules) -> None:
    """Raise Refused while the server shuts down (503) or its queue is full (429)."""
    if scheduler.draining:
        raise Refused(503, "the server is shutting down: retry when it is back", code="stopping", retry_after=5)
    if scheduler.full:
        raise Refused(429, "the queue is full: retry later", code="queue_full", retry_after=RETRY_S)


class Answer:
    """A running request in the event loop; the owner must call `cancel` at the end.

    Args:
        scheduler: Runs the request.
        request: The generation request.
        trims: Remove the answer's leading whitespace: after a prompt template the first token starts with a space, which is not part of a
            message.
    """

    def __init__(self, scheduler: Schedules, request: GenerationRequest, *, trims: bool = False) -> None:
        self.request = request
        self._trims = trims
        self._scheduler = scheduler
        self._queue: asyncio.Queue[Output] = asyncio.Queue()  # bounded by the answer's length

    def begin(self) -> None:
        """Submit the request. Raises Refused."""
        loop = asyncio.get_running_loop()

        def deliver(out: Output) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, out)

        self.request.deliver = deliver
        try:
            self._scheduler.submit(self.request)
        except (Busy, Stopping):
            require_capacity(self._scheduler)
            raise Refused(429, "the queue is full: retry later", code="queue_full", retry_after=RETRY_S) from None
        except ConfigError as bad:
            raise Refused(400, str(bad), code="invalid_value") from None

    async def outputs(self) -> AsyncIterator[Output]:
        """Yield outputs until the end. Raises Refused if the answer was cut off."""
        while True:
            out = await self._queue.get()
            if out.end in ("timeout", "stopping", "failed"):
                raise {
                    "timeout": Refused(504, "the answer took longer than this server allows: request fewer tokens", code="timeout"),
                    "stopping": Refused(503, "the server shut down before the answer was complete: retry", code="stopping", retry_after=5),
                    "failed": Refused(500, "the engine failed on this request: the server's log says why", code="engine_failed"),
                }[out.end]
            if self._trims:
                out = replace(out, text=out.text.lstrip())
                self._trims = not out.text
            yield out
            if out.end is not None:
                return

    def usage(self) -> dict[str, Any]:
        return usage(len(self.request.ids), self.request.answered, cached=self.request.cached)

    def cancel(self) -> None:
        self._scheduler.cancel(self.request)


async def whole(request: Request, answer: Answer, formatter: ResponseFormatter, logprobs: LogprobFormatter | None) -> Response:
    """Respond with the complete answer. If the client disconnects, cancel the work. Raises ClientDisconnect."""

    async def collect() -> Response:
        parts, tokens, end = [], [], "stop"
        async for out in answer.outputs():
            parts.append(out.text)
            tokens += logprobs.push(out) if logprobs else []
            end = out.end or end
        return JSONResponse(formatter.whole("".join(parts), tokens if logprobs else None, end, answer.usage()))

    try:
        return await until_disconnect(request, collect())
    finally:
        answer.cancel()


class EventStream(StreamingResponse):
    """Responds with server-sent events. If the client disconnects or stops reading for too long, the work is canceled."""

    def __init__(self, answer: Answer, formatter: ResponseFormatter, logprobs: LogprobFormatter | None, timeout: float) -> None:
        super().__init__(self._events(answer, formatter, logprobs), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._answer, self._patience = answer, timeout + PATIENCE_S

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.info("a client did not read its answer in time")
        finally:
            self._answer.cancel()

    @staticmethod
    async def _events(answer: Answer, formatter: ResponseFormatter, logprobs: LogprobFormatter | None) -> AsyncIterator[bytes]:
        for chunk in formatter.opening():
            yield chunk
        try:
            async for out in answer.outputs():
                if piece := formatter.piece(out.text, logprobs.push(out) if logprobs else None):
                    yield piece
                if out.end is not None:
                    yield b"".join(formatter.closing(out.end, answer.usage()))
        except Refused as why:  # too late for an HTTP status: an error event, which the openai client raises
            yield event(why.body())

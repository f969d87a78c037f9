"""An answer under way, as the event loop sees it: in one piece or as a stream, and at an end when its client has gone."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fedtune.errors import ConfigError
from fedtune.inference.engine.jobs import Busy, Job, Output, Stopping
from fedtune.inference.serve.limits import while_there
from fedtune.inference.serve.logprobs import Teller
from fedtune.inference.serve.protocol import Refused, Shape, event, usage

RETRY_S = 1
PATIENCE_S = 5.0  # longer than the scheduler's own time-out, which says what has happened
GONE = 499  # to a client that has hung up: nobody reads it
_log = logging.getLogger("fedtune.serve")


class Schedules(Protocol):
    """What the application needs of a `Scheduler`."""

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
    def submit(self, job: Job) -> None: ...
    def cancel(self, job: Job) -> None: ...


def check_room(scheduler: Schedules) -> None:
    if scheduler.draining:
        raise Refused(503, "the server is stopping: ask again when it is back", code="stopping", retry_after=5)
    if scheduler.full:
        raise Refused(429, "as many requests wait as may wait: ask again later", code="queue_full", retry_after=RETRY_S)


class Answer:
    """A job as the event loop sees it; `cancel` it whatever happens.

    Args:
        scheduler: Takes the job.
        job: One request.
        trims: Leave out the white space that the answer begins with: after a prompt template the first token brings the space before its
            word, which belongs to no message.
    """

    def __init__(self, scheduler: Schedules, job: Job, *, trims: bool = False) -> None:
        self.job = job
        self._trims = trims
        self._scheduler = scheduler
        self._queue: asyncio.Queue[Output] = asyncio.Queue()  # no longer than the answer

    def begin(self) -> None:
        """Hand the job over. Raises Refused."""
        loop = asyncio.get_running_loop()

        def deliver(out: Output) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, out)

        self.job.deliver = deliver
        try:
            self._scheduler.submit(self.job)
        except (Busy, Stopping):
            check_room(self._scheduler)
            raise Refused(429, "as many requests wait as may wait: ask again later", code="queue_full", retry_after=RETRY_S) from None
        except ConfigError as bad:
            raise Refused(400, str(bad), code="invalid_value") from None

    async def outputs(self) -> AsyncIterator[Output]:
        """Until the end. Raises Refused where that is not the answer's own."""
        while True:
            out = await self._queue.get()
            if out.end in ("timeout", "stopping", "failed"):
                raise {
                    "timeout": Refused(504, "the answer took longer than this server allows: ask for fewer tokens", code="timeout"),
                    "stopping": Refused(503, "the server stops and could not end this answer: ask again", code="stopping", retry_after=5),
                    "failed": Refused(500, "the engine failed on this request: the server's log says why", code="engine_failed"),
                }[out.end]
            if self._trims:
                out = replace(out, text=out.text.lstrip())
                self._trims = not out.text
            yield out
            if out.end is not None:
                return

    def usage(self) -> dict[str, Any]:
        return usage(len(self.job.ids), self.job.answered, cached=self.job.cached)

    def cancel(self) -> None:
        self._scheduler.cancel(self.job)


async def whole(request: Request, under_way: Answer, shape: Shape, teller: Teller | None) -> Response:
    """The answer in one piece; if the client hangs up before, the work ends. Raises ClientDisconnect."""

    async def collect() -> Response:
        parts, told, end = [], [], "stop"
        async for out in under_way.outputs():
            parts.append(out.text)
            told += teller.push(out) if teller else []
            end = out.end or end
        return JSONResponse(shape.whole("".join(parts), told if teller else None, end, under_way.usage()))

    try:
        return await while_there(request, collect())
    finally:
        under_way.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; a client that hangs up, or does not read for too long, ends the work."""

    def __init__(self, under_way: Answer, shape: Shape, teller: Teller | None, timeout: float) -> None:
        super().__init__(self._events(under_way, shape, teller), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._under_way, self._patience = under_way, timeout + PATIENCE_S

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.info("a client did not read its answer in time")
        finally:
            self._under_way.cancel()

    @staticmethod
    async def _events(under_way: Answer, shape: Shape, teller: Teller | None) -> AsyncIterator[bytes]:
        for chunk in shape.opening():
            yield chunk
        try:
            async for out in under_way.outputs():
                told = teller.push(out) if teller else None
                if out.text or told:
                    yield shape.piece(out.text, told)
                if out.end is not None:
                    yield b"".join(shape.closing(out.end, under_way.usage()))
        except Refused as why:  # too late for a status: an event that the openai client raises
            yield event(why.body())

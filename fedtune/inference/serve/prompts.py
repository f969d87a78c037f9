"""Encodes prompts in separate threads. Long prompts queue behind each other, and short ones never wait for them."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request

from fedtune.inference.serve.limits import until_disconnect
from fedtune.inference.serve.protocol import ChatRequest, CompletionRequest
from fedtune.inference.serve.refusal import Refused
from fedtune.inference.serve.served_model import ServedModel

LONG = 1 << 14  # characters; fewer take milliseconds
LONG_WAITING = 16
RETRY_S = 5


class Prompts:
    """Encodes the prompts of requests.

    Args:
        served: The served model.
        context: Maximum number of tokens of a prompt with its answer.
    """

    def __init__(self, served: ServedModel, context: int) -> None:
        self._served, self._context = served, context
        self._short = ThreadPoolExecutor(4, thread_name_prefix="short-prompts")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="long-prompts")
        self._waiting = 0

    async def tokens(self, request: Request, asked: CompletionRequest | ChatRequest, deadline: float) -> list[int]:
        """Return the prompt's tokens; a client that disconnects leaves the queue.

        Raises:
            Refused: 400 (the prompt is invalid or certainly longer than the context), 429 (the queue of long prompts is full), 500 (the
                model's chat template fails), 504 (the deadline, on the monotonic clock, has passed).
            ClientDisconnect: The client has disconnected.
        """
        self._served.check_length(asked.characters, self._context)
        long = asked.characters > LONG
        if long and self._waiting >= LONG_WAITING:
            raise Refused(429, "the queue of long prompts is full: retry later", code="queue_full", retry_after=RETRY_S)
        self._waiting += long
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                work = asyncio.get_running_loop().run_in_executor(
                    self._long if long else self._short, self._served.tokens, asked, self._context
                )
                return await until_disconnect(request, work)
        except TimeoutError:
            raise Refused(504, "the prompt waited longer than this server allows: retry later", code="timeout") from None
        finally:
            self._waiting -= long

"""From a request to the tokens of its prompt, in threads of its own: a long prompt waits behind long ones, and nothing waits behind it."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request

from fedtune.inference.serve.limits import while_there
from fedtune.inference.serve.offer import Offer
from fedtune.inference.serve.protocol import AskedChat, AskedCompletion, Refused

LONG = 1 << 14  # characters; fewer take milliseconds
LONG_WAITING = 16
RETRY_S = 5


class Prompts:
    """Makes the prompts of requests.

    Args:
        offer: What is served.
        context: Most tokens of a prompt and its answer.
    """

    def __init__(self, offer: Offer, context: int) -> None:
        self._offer, self._context = offer, context
        self._short = ThreadPoolExecutor(4, thread_name_prefix="short-prompts")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="long-prompts")
        self._waiting = 0

    async def tokens(self, request: Request, asked: AskedCompletion | AskedChat, deadline: float) -> list[int]:
        """The prompt's tokens; a client that hangs up leaves the queue.

        Raises:
            Refused: 400 (the prompt is wrong, or longer than the context whatever its tokens), 429 (as many long prompts wait as may wait),
                500 (the model's chat template fails), 504 (the deadline has passed, in seconds of the monotonic clock).
            ClientDisconnect: The client has gone.
        """
        self._offer.check_length(asked.characters, self._context)
        long = asked.characters > LONG
        if long and self._waiting >= LONG_WAITING:
            raise Refused(429, "as many long prompts wait as may wait: ask again later", code="queue_full", retry_after=RETRY_S)
        self._waiting += long
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                work = asyncio.get_running_loop().run_in_executor(
                    self._long if long else self._short, self._offer.tokens, asked, self._context
                )
                return await while_there(request, work)
        except TimeoutError:
            raise Refused(504, "the prompt waited longer than this server allows: ask again later", code="timeout") from None
        finally:
            self._waiting -= long

"""The scheduler for models that run on transformers: one request at a time, each by `model.generate`.

Requests share neither a cache nor a forward pass. All else is the engine's `Scheduler`: sampling, streaming, stop strings, deadlines,
canceling, the queue and the shutdown.
"""

import threading
from collections.abc import Generator, Sequence
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.requests import GenerationRequest, Output
from fedtune.inference.engine.sample import Sampler, Sampling
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.generate_transformers import HubModel
from fedtune.models.checkpoint import first_line

CONTEXT = 2048  # bounds the memory of an untrusted request


class SequentialScheduler(Scheduler):
    """Answers requests one at a time; `step` generates one complete answer.

    Args:
        model: A loaded model.
        max_waiting: Maximum number of waiting requests.
        unstated: Token limit of a prompt with its answer if the model's config has none.

    Attributes:
        passes: Number of tokens generated so far.
        single: Whether each request is independent, without earlier turns of a conversation.
    """

    def __init__(self, model: HubModel, *, max_waiting: int = 0, unstated: int = CONTEXT) -> None:
        places: Any = _NoCaches(unstated if model.context is None else model.context)
        unused: Any = None  # transformers runs the model
        super().__init__(unused, model.text, places, model.vocabulary, max_running=1, max_waiting=max_waiting)
        self.text, self.single = model.text, model.seq2seq
        self._model = model

    def submit(self, request: GenerationRequest) -> None:
        """Submit a request, like `Scheduler.submit`."""
        if self._model.seq2seq:
            request.joins = False  # the answer does not continue the prompt
        super().submit(request)

    def step(self) -> bool:
        """Generate one answer. Returns False if no request waits."""
        self._forget()
        self._admit()
        if not self._running:
            return False
        sequence = self._running[0]
        if self._model.seq2seq:  # as in transformers, the repetition penalty ignores the encoder's input
            sequence.sampler = Sampler(sequence.request.sampling, [], self._vocabulary)

        def choose(logits: np.ndarray) -> int | None:
            self._forget()
            if self._closed or sequence not in self._running:
                return None
            self._decide(sequence, logits)
            self.passes += 1
            return sequence.tokens[-1] if sequence in self._running else None

        self._model.write(sequence.request.ids, sequence.request.max_new_tokens, choose)
        if sequence in self._running and not self._closed:
            raise RuntimeError("transformers ended an answer too early")
        return True

    def write(self, ids: Sequence[int], sampling: Sampling, length: int) -> Generator[str, None, None]:
        """Yield one answer piece by piece; the caller may stop early.

        Raises:
            ConfigError: The answer does not fit into the model's context.
            ModelError: transformers failed.
        """
        if len(ids) + length > self.limit:
            raise ConfigError(
                f"the prompt's {len(ids)} tokens and {length} new tokens exceed the model's context of {self.limit}: shorten one"
            )
        outputs: SimpleQueue[Output | Exception] = SimpleQueue()
        request = GenerationRequest(ids=ids, sampling=sampling, max_new_tokens=length, deliver=outputs.put)
        self.submit(request)

        def work() -> None:
            try:
                self.step()
            except Exception as bad:
                outputs.put(bad)

        worker = threading.Thread(target=work, name="transformers", daemon=True)
        worker.start()
        try:
            while True:
                out = outputs.get()
                if isinstance(out, Exception):
                    raise ModelError(f"transformers failed on this model: {first_line(out)}") from out
                yield out.text
                if out.end:
                    return
        finally:
            self.cancel(request)
            worker.join()
            self._forget()


class _NoCaches:
    """A placeholder for the caches, which transformers manages itself."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def open(self, ids: Sequence[int], adapter: str | None) -> Any:
        return SimpleNamespace(length=0)

    def close(self, cache: Any, ids: Sequence[int], adapter: str | None) -> None:
        """Do nothing."""

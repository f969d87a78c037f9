"""The scheduler of models that transformers runs: requests one after the other, each by `model.generate`.

There is no cache here that several requests could share, nor one pass for all of them; everything else is the engine's `Scheduler`: what is
drawn and how, streaming, stop strings, deadlines, cancelling, the queue and the stop.
"""

import threading
from collections.abc import Generator, Sequence
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import ConfigError, ModelError
from fedtune.inference.engine.jobs import Job, Output
from fedtune.inference.engine.sample import Sampler, Sampling
from fedtune.inference.engine.schedule import Scheduler
from fedtune.inference.generate_transformers import HubModel
from fedtune.models.checkpoint import first_line

CONTEXT = 2048  # bounds the memory that a request of strangers may take


class OneByOne(Scheduler):
    """Answers requests one after the other; `step` is one whole answer.

    Args:
        model: Loaded.
        max_waiting: Requests that may wait while one is answered.
        unstated: Most tokens of a prompt and its answer where the model names no most.

    Attributes:
        passes: Tokens so far.
        single: Whether each request stands alone, so that no turns of a talk stand before it.
    """

    def __init__(self, model: HubModel, *, max_waiting: int = 0, unstated: int = CONTEXT) -> None:
        places: Any = _Places(unstated if model.context is None else model.context)
        unused: Any = None  # the model goes by itself
        super().__init__(unused, model.text, places, model.vocabulary, max_running=1, max_waiting=max_waiting)
        self.text, self.single = model.text, model.seq2seq
        self._model = model

    def submit(self, job: Job) -> None:
        """As `Scheduler.submit`."""
        if self._model.seq2seq:
            job.joins = False  # the prompt is another text
        super().submit(job)

    @torch.inference_mode()
    def step(self) -> bool:
        """One answer; False where nobody waits."""
        self._forget()
        self._admit()
        if not self._running:
            return False
        sequence = self._running[0]
        if self._model.seq2seq:  # as in transformers, what the encoder has read is no repetition
            sequence.sampler = Sampler(sequence.job.sampling, [], self._vocabulary)

        def choose(logits: Tensor) -> int | None:
            self._forget()
            if self._closed or sequence not in self._running:
                return None
            self._decide(sequence, logits)
            self.passes += 1
            return sequence.tokens[-1] if sequence in self._running else None

        self._model.write(sequence.job.ids, sequence.job.max_new_tokens, choose)
        if sequence in self._running and not self._closed:
            raise RuntimeError("transformers ended an answer that was not at its end")
        return True

    def write(self, ids: Sequence[int], sampling: Sampling, length: int) -> Generator[str, None, None]:
        """One answer, piece by piece; stop whenever.

        Raises:
            ConfigError: The answer does not fit into the model's context.
            ModelError: transformers fails on the model.
        """
        if len(ids) + length > self.limit:
            raise ConfigError(
                f"the prompt's {len(ids)} tokens and {length} new ones are more than the model's context, {self.limit}: shorten one"
            )
        heard: SimpleQueue[Output | Exception] = SimpleQueue()
        job = Job(ids=ids, sampling=sampling, max_new_tokens=length, deliver=heard.put)
        self.submit(job)

        def work() -> None:
            try:
                self.step()
            except Exception as bad:
                heard.put(bad)

        worker = threading.Thread(target=work, name="transformers", daemon=True)
        worker.start()
        try:
            while True:
                out = heard.get()
                if isinstance(out, Exception):
                    raise ModelError(f"transformers fails on this model: {first_line(out)}") from out
                yield out.text
                if out.end:
                    return
        finally:
            self.cancel(job)
            worker.join()
            self._forget()


class _Places:
    """Stands for the caches, which are transformers' own affair."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def open(self, ids: Sequence[int], adapter: str | None) -> Any:
        return SimpleNamespace(length=0)

    def close(self, cache: Any, ids: Sequence[int], adapter: str | None) -> None:
        """Nothing to give back."""

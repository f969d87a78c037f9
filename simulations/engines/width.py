"""Chooses the number of clients per batch for `engine.batched=auto`: limited by tokens and memory, and only if measured to be faster."""

import dataclasses
import statistics
import time
from collections.abc import Sequence

from fedtune.clients.steps import steps_of
from fedtune.clients.trainer import train
from fedtune.clients.turns import Work
from fedtune.config import TaskConfig
from fedtune.contracts.task import task_of
from fedtune.models import LiveAdapter
from fedtune.simulations.engines.batched import TurnInput, train_together
from fedtune.simulations.engines.client_batch import Way

WIDEST = 32  # clients
_TOKENS = 1024  # tokens of a flat batch with the best speedup in benchmarks/batched.py, on two cores, for models of 1 to 20 M parameters
_BYTES = 1 << 29  # bytes of a flat batch's logits and their gradients
_STATE = 1 << 30  # bytes of the clients' own tensors with moments and gradients


def allowed(live: LiveAdapter, turn_inputs: Sequence[TurnInput], task: TaskConfig) -> int:
    """The maximum number of clients whose flat batch pays off and fits the memory."""
    lengths = [len(e.input_ids) for j in turn_inputs for e in j.examples]
    tokens = max(1, round(turn_inputs[0].plan.batch_size * statistics.mean(lengths)))
    words = 1 if task_of(task).head else int(live.backbone.model.config.get_text_config().vocab_size)
    state = sum(p.numel() for p in live.parameters.values()) * 4 * 6  # tensors, moments, anchor, gradients, float32
    return min(WIDEST, max(1, _TOKENS // tokens), max(1, _BYTES // (tokens * words * 4 * 3)), max(1, _STATE // state))


def pays(live: LiveAdapter, turn_inputs: Sequence[TurnInput], task: TaskConfig, *, pad_id: int, way: Way) -> bool:
    """Whether two steps of all clients together are faster than two steps of each alone; the results are discarded.

    Raises:
        UpdateError: A client's turn fails, for example because its loss overflows.
    """
    turn_inputs = [
        dataclasses.replace(j, plan=dataclasses.replace(j.plan, steps=min(2, steps_of(j.plan, len(j.examples))))) for j in turn_inputs
    ]
    ratios, few = [], turn_inputs[:4]
    for repeat in range(4):
        start = time.perf_counter()
        for j in few:
            live.load(j.start)
            train(Work(live=live, start=j.start, plan=j.plan, task=task, examples=j.examples, pad_id=pad_id, extra=j.extra))
        alone = (time.perf_counter() - start) / len(few)
        start = time.perf_counter()
        train_together(live, turn_inputs, task, pad_id=pad_id, way=way)
        if repeat:  # the first warms up
            ratios.append(alone * len(turn_inputs) / (time.perf_counter() - start))
    return statistics.median(ratios) > 1.1

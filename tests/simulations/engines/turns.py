"""Turns of very different clients, and the check that a stack trains each as the trainer does."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedtune.clients.steps import steps_of
from fedtune.clients.trainer import TrainingResult, train
from fedtune.config import TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.data import Example
from fedtune.errors import FedtuneError
from fedtune.models import LiveAdapter
from fedtune.simulations.engines import stacked
from fedtune.simulations.engines.batched import TurnInput, train_together
from fedtune.simulations.engines.client_batch import Way
from tests.working import work


def turn_inputs_of(clients: Mapping[str, Sequence[Example]], base: AdapterState, **changes: Any) -> list[TurnInput]:
    """One turn per client, each with its own initial tensors: two passes, micro-batches of four, at most seven steps."""
    out = []
    for k, (client, examples) in enumerate(clients.items()):
        gen = torch.Generator().manual_seed(k)
        start = base.replace({n: t + 0.05 * torch.randn(t.shape, generator=gen) for n, t in base.tensors.items()})
        plan = Plan(
            round=1,
            client=client,
            base_version=0,
            seed=k,
            steps=None,
            epochs=2.0,
            batch_size=4,
            lr=1e-2,
            lr_last=2e-3 * k,
            weight_decay=0.01,
        )
        plan = dataclasses.replace(plan, **changes)
        out.append(TurnInput(plan=dataclasses.replace(plan, steps=min(7, steps_of(plan, len(examples)))), start=start, examples=examples))
    return out


def train_alone(live: LiveAdapter, turn_input: TurnInput, task: TaskConfig, pad_id: int) -> tuple[AdapterState, TrainingResult]:
    """The trainer's result for one client."""
    live.load(turn_input.start)
    turn = train(work(live, turn_input.examples, turn_input.plan, task, pad_id, start=turn_input.start, extra=turn_input.extra))
    return live.read(version=0), turn


def check(
    live: LiveAdapter, turn_inputs: list[TurnInput], task: TaskConfig, pad_id: int, way: Way = stacked.installed, within: float = 1e-4
) -> None:
    """Every client's update is the trainer's, to `within` of its size; clients leave the stack at different times."""
    together = train_together(live, turn_inputs, task, pad_id=pad_id, way=way)
    steps = set()
    for turn_input, actual in zip(turn_inputs, together, strict=True):
        expected, turn = train_alone(live, turn_input, task, pad_id)
        assert not isinstance(actual, FedtuneError), actual
        assert distance(actual[0], expected) <= within * distance(expected, turn_input.start), turn_input.plan.client
        assert actual[0].spec == expected.spec
        assert actual[1].loss is not None and turn.loss is not None
        assert actual[1].steps == turn.steps and math.isclose(actual[1].loss, turn.loss, rel_tol=max(within, 1e-5))
        assert (actual[1].start_loss is None) == (turn.start_loss is None)
        assert turn.start_loss is None or math.isclose(actual[1].start_loss or 0, turn.start_loss, rel_tol=max(within, 1e-5))
        steps.add(turn.steps)
    assert len(steps) > 2


def distance(a: AdapterState, b: AdapterState) -> float:
    return math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in a.tensors))

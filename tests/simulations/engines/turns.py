"""Turns of very unlike clients, and the check that a stack takes each as the trainer does."""

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
from fedtune.simulations.engines.batched import Job, train_together
from fedtune.simulations.engines.client_batch import Way
from tests.working import work


def jobs_of(clients: Mapping[str, Sequence[Example]], base: AdapterState, **changes: Any) -> list[Job]:
    """A turn a client, each from tensors of its own, two passes in micro-batches of four, seven steps at most."""
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
        out.append(Job(plan=dataclasses.replace(plan, steps=min(7, steps_of(plan, len(examples)))), start=start, examples=examples))
    return out


def alone(live: LiveAdapter, job: Job, task: TaskConfig, pad_id: int) -> tuple[AdapterState, TrainingResult]:
    """What the trainer makes of a job."""
    live.load(job.start)
    turn = train(work(live, job.examples, job.plan, task, pad_id, start=job.start, extra=job.extra))
    return live.read(version=0), turn


def check(live: LiveAdapter, jobs: list[Job], task: TaskConfig, pad_id: int, way: Way = stacked.installed, within: float = 1e-4) -> None:
    """Every client's update is the trainer's, to `within` of its size; clients leave the stack at different times."""
    together = train_together(live, jobs, task, pad_id=pad_id, way=way)
    steps = set()
    for job, got in zip(jobs, together, strict=True):
        wanted, turn = alone(live, job, task, pad_id)
        assert not isinstance(got, FedtuneError), got
        assert distance(got[0], wanted) <= within * distance(wanted, job.start), job.plan.client
        assert got[0].spec == wanted.spec
        assert got[1].loss is not None and turn.loss is not None
        assert got[1].steps == turn.steps and math.isclose(got[1].loss, turn.loss, rel_tol=max(within, 1e-5))
        assert (got[1].start_loss is None) == (turn.start_loss is None)
        assert turn.start_loss is None or math.isclose(got[1].start_loss or 0, turn.start_loss, rel_tol=max(within, 1e-5))
        steps.add(turn.steps)
    assert len(steps) > 2


def distance(a: AdapterState, b: AdapterState) -> float:
    return math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in a.tensors))

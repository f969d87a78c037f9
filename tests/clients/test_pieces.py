"""Micro-batches do not change the result, and out of memory only halves the micro-batch."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.clients.trainer import TrainingResult, train
from fedtune.clients.turns import _base
from fedtune.clients.workspace import Workspace
from fedtune.config import DataConfig, PeftConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.errors import Decline
from fedtune.models.lean import step_of
from tests.quick import quick
from tests.tiny import texts, tiny_config
from tests.working import work_in

PLAN = Plan(round=1, client="c0", base_version=0, steps=4, epochs=None, batch_size=6, lr=1e-2, lr_last=1e-3, seed=3)


def workspace(path: Path, kind: str = "causal_lm", dropout: float = 0.0) -> Workspace:
    task = TaskConfig(kind=kind, max_length=16, max_new_tokens=4, stride_texts=False)
    peft = PeftConfig(rank=2, alpha=4.0, dropout=dropout)
    config = tiny_config(path, texts(60), task=task, peft=peft)
    columns = {"classification": {"columns": {"label": "label"}}, "instruction": {"prompt": "{question}", "answer": " {reply}"}}
    data = DataConfig(**{**dataclasses.asdict(config.data), **columns.get(kind, {})})
    return Workspace(dataclasses.replace(config, data=data))


def turn(space: Workspace, micro: int | None, **plan: Any) -> tuple[AdapterState, TrainingResult]:
    drawn = torch.Generator().manual_seed(0)
    begin = space.live.read(version=0)
    begin = begin.replace({n: 0.1 * torch.randn(t.shape, generator=drawn) for n, t in begin.tensors.items()})
    space.live.load(begin)
    rows, turn_plan = space.examples("c0", "train"), dataclasses.replace(PLAN, **plan)
    turned = train(work_in(space, turn_plan, examples=rows), micro=micro)
    return space.live.read(version=0), turned


def distance(a: AdapterState, b: AdapterState) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a.tensors)


@pytest.mark.parametrize("kind", ["causal_lm", "instruction", "classification"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path, kind: str, accumulate: int) -> None:
    space = workspace(tmp_path, kind)
    step = {"steps": 1, "accumulate": accumulate, "optimizer": "sgd", "lr": 1.0, "clip_norm": None}
    whole, one = turn(space, None, **step)
    assert len({len(e.input_ids) for e in space.examples("c0", "train")}) > 2  # so the pieces count different numbers of tokens
    for micro in (1, 4):
        pieces, turned = turn(space, micro, **step)
        assert distance(whole, pieces) < 1e-6 and turned.loss == pytest.approx(one.loss, rel=1e-5)


def test_a_micro_batch_of_the_batch_size_gives_the_same_bits(tmp_path: Path) -> None:
    space = workspace(tmp_path, dropout=0.2)
    assert distance(turn(space, None)[0], turn(space, 6)[0]) == distance(turn(space, None)[0], turn(space, 99)[0]) == 0.0


class Small:
    """Memory that fits at most `rows` rows from the step `since` on; it runs out in the middle of a step."""

    def __init__(self, rows: int, since: int, error: Exception) -> None:
        self.rows, self.since, self.error, self.real, self.batches = rows, since, error, _base.loss_sum, 0

    def __call__(self, model: Any, batch: dict[str, torch.Tensor], task: TaskConfig) -> Any:
        out = self.real(model, batch, task)  # dropout has been drawn before
        self.batches += 1
        if self.batches > self.since and len(batch["input_ids"]) > self.rows:
            raise self.error
        return out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
@pytest.mark.parametrize("dropout", quick([0.0, 0.3], 0.3))
def test_out_of_memory_halves_the_micro_batch_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, dropout: float
) -> None:
    space = workspace(tmp_path, dropout=dropout)
    expected, _ = turn(space, 3, accumulate=2)
    # from the first piece on, 6 rows are too many and 3 are not; the second attempt draws the same dropout as the first
    monkeypatch.setattr(_base, "loss_sum", Small(3, 0, error))
    actual, turned = turn(space, None, accumulate=2)
    assert distance(expected, actual) < 1e-6 and (turned.micro, turned.out_of_memory) == (3, 1)


def test_out_of_memory_within_a_step_discards_its_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, error = workspace(tmp_path), torch.OutOfMemoryError("CUDA out of memory")
    expected, _ = turn(space, None, accumulate=2)
    # the second batch of the first step fails; if the first batch's gradient stayed, it would count twice
    monkeypatch.setattr(_base, "loss_sum", Small(3, 1, error))
    actual, turned = turn(space, None, accumulate=2)
    assert distance(expected, actual) < 1e-5 and (turned.micro, turned.out_of_memory) == (3, 1)
    monkeypatch.setattr(_base, "loss_sum", Small(1, 3, error))
    actual, turned = turn(space, 5, accumulate=2)
    assert distance(expected, actual) < 1e-5 and (turned.micro, turned.out_of_memory) == (1, 2)  # 5 → 2 → 1


def test_a_single_row_that_does_not_fit_declines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = workspace(tmp_path)
    monkeypatch.setattr(_base, "loss_sum", Small(0, 2, MemoryError()))
    with pytest.raises(Decline, match=r"^out of memory with a single row of \d+ tokens: lower task.max_length, or take") as bad:
        turn(space, None)
    assert bad.value.kind == "memory"
    assert all(p.grad is None and p.requires_grad for p in space.live.parameters.values())


def test_a_single_row_that_does_not_fit_is_tried_once_more_without_kept_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = workspace(tmp_path, dropout=0.2)
    expected, _ = turn(space, 1)
    step = step_of(space.live.model)
    assert step is not None

    def loss_sum(*given: Any, real: Any = _base.loss_sum) -> Any:
        out = real(*given)
        if step.kept:
            raise MemoryError
        return out

    monkeypatch.setattr(_base, "loss_sum", loss_sum)
    actual, turned = turn(space, 2)
    assert distance(expected, actual) < 1e-6 and (turned.micro, turned.kept_layers, turned.out_of_memory) == (1, 0, 2)
    assert step.kept == step.layers  # for the next turn


def test_other_errors_are_not_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = workspace(tmp_path)
    monkeypatch.setattr(_base, "loss_sum", Small(0, 0, RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        turn(space, None)

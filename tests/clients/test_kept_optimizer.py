"""A client that keeps its optimizer's state trains in two turns as in one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.clients import trainer
from fedtune.clients.store import ClientStore
from fedtune.clients.trainer import TrainingResult, train
from fedtune.clients.workspace import Workspace
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.experiment import simulate
from tests.tiny import tiny_config
from tests.working import work_in

PLAN = Plan(round=1, client="c0", base_version=0, steps=2, epochs=None, batch_size=1, lr=0.01, lr_last=0.01, keep_optimizer=True)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tiny_config(tmp_path_factory.mktemp("kept")))


def turn(
    space: Workspace, start: AdapterState, plan: Plan = PLAN, moments: AdapterState | None = None
) -> tuple[AdapterState, TrainingResult]:
    """A turn on one row, so that all batches are equal."""
    space.live.load(start)
    done = train(work_in(space, plan, examples=space.examples("c0", "train")[:1], start=start), moments=moments)
    return space.live.read(version=0), done


def two_turns(space: Workspace, **changes: Any) -> float:
    """Distance of two turns of two steps from one turn of four."""
    begin = space.initial
    one, first = turn(space, begin, dataclasses.replace(PLAN, **changes))
    two, _ = turn(space, one, dataclasses.replace(PLAN, **changes), first.moments)
    whole, _ = turn(space, begin, dataclasses.replace(PLAN, steps=4, **changes))
    return max(float((two[n] - whole[n]).abs().max()) for n in whole.tensors)


def test_two_turns_are_one_longer_turn(space: Workspace) -> None:
    assert two_turns(space) < 1e-6
    assert two_turns(space, weight_decay=0.1) < 1e-6
    assert two_turns(space, keep_optimizer=False) > 1e-3


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_the_check_notices_a_part_that_is_lost(space: Workspace, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    right = trainer._moments
    monkeypatch.setattr(
        trainer,
        "_moments",
        lambda *args: (s := right(*args)).replace({n: torch.zeros_like(t) if n.endswith(f"/{lost}") else t for n, t in s.tensors.items()}),
    )
    assert two_turns(space) > 1e-4


def test_two_tensors_for_each_trained_tensor(space: Workspace) -> None:
    _, done = turn(space, space.initial)
    assert done.moments is not None
    kept = {(n, p): done.moments[f"{n}/{p}"].shape for n in space.initial.tensors for p in ("exp_avg", "exp_avg_sq")}
    assert kept == {(n, p): space.initial[n].shape for n, p in kept}
    assert len(done.moments.tensors) == 3 * len(space.initial.tensors)  # and a count of steps
    assert all(done.moments[f"{n}/step"].item() == 2 for n in space.initial.tensors)
    assert turn(space, space.initial, dataclasses.replace(PLAN, keep_optimizer=False))[1].moments is None
    assert turn(space, space.initial, dataclasses.replace(PLAN, optimizer="sgd"))[1].moments is None  # it has no state


def test_a_tensor_that_does_not_train_keeps_its_moments(space: Workspace) -> None:
    one, first = turn(space, space.initial, dataclasses.replace(PLAN, train=("*", "!*.lora_A")))
    assert first.moments is not None and not any(".lora_A/" in n for n in first.moments.tensors)
    _, second = turn(space, one, dataclasses.replace(PLAN, train=("*", "!*.lora_B")), first.moments)
    assert second.moments is not None
    assert all(torch.equal(second.moments[n], t) for n, t in first.moments.tensors.items() if ".lora_B/" in n)
    assert any(".lora_A/" in n for n in second.moments.tensors)


def test_moments_of_other_ranks_are_not_continued(space: Workspace) -> None:
    one, first = turn(space, space.initial)
    assert first.moments is not None
    other = first.moments.replace(ranks=dict.fromkeys(first.moments.spec.ranks, 1))
    assert all(torch.equal(t, turn(space, one)[0][n]) for n, t in turn(space, one, moments=other)[0].tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("batched", ["none", "auto"])
def test_a_run_that_is_killed_and_resumed_keeps_every_byte(tmp_path: Path, batched: str) -> None:
    target = {"_target_": "fedtune.strategies.diloco.DiLoCo"}
    config = tiny_config(tmp_path, rounds=4, strategy=target)
    config.engine.batched = batched
    whole = simulate(config)
    store = ClientStore(whole / "clients", 9).substore("optimizer")
    assert store.clients() == ["c0", "c1", "c2", "c3"]
    kept = {f: f.read_bytes() for f in sorted(store.folder.rglob("round-*.safetensors"))}
    assert {f.stem for f in kept} == {"round-0001", "round-0002", "round-0003", "round-0004"}
    for file in kept:  # two steps a round, all of them counted
        steps = {float(x) for n, x in AdapterState.load(file).tensors.items() if n.endswith("/step")}
        assert steps == {2.0 * int(file.stem[-4:])}
    end = (whole / "adapter" / "fedtune.safetensors").read_bytes()
    for round in (3, 4):  # as after a kill in round 3: later files of clients may exist
        (whole / "checkpoints" / f"round-{round:04d}").rename(tmp_path / f"{batched}-{round}")
    (store.folder_of("c1") / "round-0004.safetensors").unlink()
    simulate(dataclasses.replace(config, resume=str(whole)))
    assert {f: f.read_bytes() for f in kept} == kept and (whole / "adapter" / "fedtune.safetensors").read_bytes() == end

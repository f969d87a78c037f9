"""Clients trained at once are the clients trained one after the other."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from fedtune import flower
from fedtune.app import simulate, starting_adapter
from fedtune.clients.app import Prepared
from fedtune.clients.trainer import train
from fedtune.clients.workspace import Workspace
from fedtune.config import DeviceClass, DevicesConfig, EngineConfig, EvalConfig, PeftConfig, TaskConfig
from fedtune.errors import FedtuneError, UpdateError
from fedtune.plan import Plan
from fedtune.simulations.batched import Job, train_together
from fedtune.state import AdapterState
from tests.tiny import texts, tiny_config

TASKS = {
    "causal_lm": TaskConfig(kind="causal_lm", max_length=16, stride_texts=False),
    "instruction": TaskConfig(kind="instruction", max_length=32, max_new_tokens=8),
    "classification": TaskConfig(kind="classification", max_length=16),
}


@pytest.fixture(scope="module", params=list(TASKS))
def space(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    config = tiny_config(
        tmp_path_factory.mktemp(request.param), rows=ragged(), task=TASKS[request.param], peft=PeftConfig(rank=3, alpha=4.0)
    )
    if request.param == "instruction":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompt="{question} ->", answer=" {reply}"))
    return Workspace(config)


def ragged() -> list[dict[str, Any]]:
    """Clients of very different size: 20, 9, 4 and 2 rows."""
    rows = texts(35)
    for i, row in enumerate(rows):
        row["client"] = "c0" if i < 20 else "c1" if i < 29 else "c2" if i < 33 else "c3"
    return rows


def jobs(space: Workspace, **changes: Any) -> list[Job]:
    out, base = [], starting_adapter(space.config, space)
    for k, client in enumerate(space.client_ids):
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
        out.append(Job(plan=dataclasses.replace(plan, **changes), start=start, examples=space.examples(client, "train"), max_steps=7))
    return out


def one_by_one(space: Workspace, todo: list[Job]) -> list[tuple[AdapterState, Any]]:
    out = []
    for job in todo:
        space.live.load(job.start)
        turn = train(space.live, job.examples, job.plan, space.config.task, pad_id=space.pad_id, max_steps=job.max_steps)
        out.append((space.live.read(version=0), turn))
    return out


def agree(space: Workspace, todo: list[Job]) -> None:
    together = train_together(space.live, todo, space.config.task, pad_id=space.pad_id)
    steps = set()
    for job, got, (wanted, turn) in zip(todo, together, one_by_one(space, todo), strict=True):
        assert not isinstance(got, FedtuneError)
        moved = math.sqrt(sum(float((wanted[n] - job.start[n]).square().sum()) for n in wanted.tensors))
        apart = math.sqrt(sum(float((wanted[n] - got[0][n]).square().sum()) for n in wanted.tensors))
        assert apart <= 1e-4 * moved, job.plan.client
        assert got[1].steps == turn.steps and got[1].loss == pytest.approx(turn.loss, rel=1e-5)
        steps.add(turn.steps)
    assert len(steps) > 2  # clients left the stack at different times


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2}, {"clip_norm": 0.05}, {"clip_norm": None}, {"prox": 0.5}, {"train": ("*.lora_B", "*weight")}],
    ids=["ragged", "accumulated", "clipped", "unclipped", "proximal", "partly trained"],
)
def test_each_update_is_the_sequential_one(space: Workspace, changes: dict[str, Any]) -> None:
    agree(space, jobs(space, **changes))


def test_plans_of_one_stack_may_differ(space: Workspace) -> None:
    mixed = [
        dataclasses.replace(
            j, plan=dataclasses.replace(j.plan, prox=0.3 * k, clip_norm=None if k == 2 else 0.1 * (k + 1), lr=1e-3 * (k + 1))
        )
        for k, j in enumerate(jobs(space))
    ]
    agree(space, mixed)


def test_the_same_seed_gives_the_same_bits(space: Workspace) -> None:
    first, second = (train_together(space.live, jobs(space), space.config.task, pad_id=space.pad_id) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert not isinstance(a, FedtuneError) and not isinstance(b, FedtuneError)
        assert all(torch.equal(a[0][n], b[0][n]) for n in a[0].tensors)


def test_a_broken_client_leaves_and_the_others_do_not_notice(space: Workspace) -> None:
    todo = jobs(space)
    poison = {n: torch.full_like(t, 1e30) for n, t in todo[1].start.tensors.items()}
    todo[1] = dataclasses.replace(todo[1], start=todo[1].start.replace(poison))
    got = train_together(space.live, todo, space.config.task, pad_id=space.pad_id)
    assert isinstance(got[1], UpdateError) and "step 1 of" in str(got[1])
    for k, (wanted, _) in zip((0, 2, 3), one_by_one(space, [todo[k] for k in (0, 2, 3)]), strict=True):
        state = got[k]
        assert not isinstance(state, FedtuneError)
        assert all(torch.allclose(state[0][n], wanted[n], atol=1e-5) for n in wanted.tensors)


def test_the_model_is_as_it_was_afterwards(space: Workspace) -> None:
    before = space.score(jobs(space)[0].start, space.test_examples(), space.examples("c0", "held_out"))
    train_together(space.live, jobs(space), space.config.task, pad_id=space.pad_id)
    assert space.score(jobs(space)[0].start, space.test_examples(), space.examples("c0", "held_out")) == before


@pytest.mark.parametrize("p", [0.3])
def test_adapter_dropout_draws_from_each_clients_own_seed(tmp_path: Path, p: float) -> None:
    space = Workspace(tiny_config(tmp_path, rows=ragged(), peft=PeftConfig(rank=3, alpha=4.0, dropout=p)))
    agree(space, jobs(space))


@pytest.mark.parametrize("batched", ["3", "auto"])
def test_a_run_ends_with_the_sequential_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], batched: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    devices = DevicesConfig(classes={"phone": DeviceClass(offline=0.3, max_steps=1), "laptop": DeviceClass()})
    config = tiny_config(tmp_path, rows=ragged(), rounds=3, devices=devices, eval=EvalConfig(where="door", clients=-1))
    runs = {}
    for mode in ("none", batched):
        path = simulate(dataclasses.replace(config, engine=EngineConfig(threads=1, batched=mode)))
        lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        runs[mode] = (AdapterState.load(path / "adapter" / "fedtune.safetensors"), lines)
    (alone, lines), (together, others) = runs["none"], runs[batched]
    assert max(float((alone[n] - together[n]).abs().max()) for n in alone.tensors) < 1e-5
    for a, b in zip(lines, others, strict=True):
        assert {k: a.get(k) for k in ("round", "client", "steps", "dropped", "counted")} == {
            k: b.get(k) for k in ("round", "client", "steps", "dropped", "counted")
        }
        assert b.get("loss") == pytest.approx(a.get("loss"), rel=1e-5) and b.get("perplexity") == pytest.approx(
            a.get("perplexity"), rel=1e-4
        )
    assert any("offline" in str(x.get("dropped")) for x in lines)


def test_too_little_memory_halves_the_batch(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedtune.simulations.together as module

    real, sizes = module.train_together, []
    flower.identify_process(run_id=1)

    def scarce(live: Any, jobs: Any, task: Any, *, pad_id: int) -> Any:
        sizes.append(len(jobs))
        if len(jobs) > 1:
            raise MemoryError
        return real(live, jobs, task, pad_id=pad_id)

    monkeypatch.setattr(module, "train_together", scarce)
    todo = [
        Prepared(message=Message(RecordDict(), 1, "train"), plan=j.plan, start=j.start, examples=j.examples, device=None, device_class="")
        for j in jobs(space)
    ]
    replies = module.Together(space, "4")._train(todo)
    assert sizes == [4, 2, 1, 1, 2, 1, 1] and all("update" in r.content.config_records for r in replies)


def test_clients_evaluated_at_once_have_their_own_metrics(space: Workspace) -> None:
    state = jobs(space)[0].start
    groups = [space.examples(c, "train") for c in space.client_ids]
    together = space.score(state, *groups[:2], [], *groups[2:])
    assert together.pop(2) == {}
    for group, metrics in zip(groups, together, strict=True):
        (alone,) = space.score(state, group)
        assert metrics.keys() == alone.keys() and all(metrics[k] == pytest.approx(alone[k], rel=1e-5) for k in alone)


def test_mixed_ranks_share_a_stack(tmp_path: Path) -> None:
    wide, narrow = (Workspace(tiny_config(tmp_path, rows=ragged(), peft=PeftConfig(rank=r, alpha=4.0))) for r in (3, 2))
    todo = [j for k, (w, n) in enumerate(zip(jobs(wide), jobs(narrow), strict=True)) for j in [n if k % 2 else w]]
    together = train_together(wide.live, todo, wide.config.task, pad_id=wide.pad_id)
    for k, (job, got) in enumerate(zip(todo, together, strict=True)):
        ((wanted, turn),) = one_by_one(narrow if k % 2 else wide, [job])
        assert not isinstance(got, FedtuneError) and got[0].spec.ranks == wanted.spec.ranks
        moved = math.sqrt(sum(float((wanted[n] - job.start[n]).square().sum()) for n in wanted.tensors))
        apart = math.sqrt(sum(float((wanted[n] - got[0][n]).square().sum()) for n in wanted.tensors))
        assert apart <= 1e-4 * moved and got[1].steps == turn.steps

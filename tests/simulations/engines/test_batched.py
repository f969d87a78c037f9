"""Batched training of clients equals sequential training."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.clients.app import PreparedTurn
from fedtune.clients.host import ClientHost
from fedtune.clients.turns import turn_of
from fedtune.clients.turns.scaffold import BatchedCorrection
from fedtune.clients.workspace import Workspace
from fedtune.config import DeviceClass, DevicesConfig, EngineConfig, EvalConfig, PeftConfig, TaskConfig
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.wire import MessageWriter
from fedtune.errors import CheckpointError, FedtuneError, UpdateError
from fedtune.experiment import simulate
from fedtune.models.lean import functions, places
from fedtune.simulations.engines import batched, stacked
from fedtune.simulations.engines.batched import TurnInput, train_together
from tests.quick import quick
from tests.simulations.engines.turns import check, train_alone, turn_inputs_of
from tests.tiny import texts, tiny_config
from tests.working import host_for

TASKS = {
    "causal_lm": TaskConfig(kind="causal_lm", max_length=16, stride_texts=False),
    "instruction": TaskConfig(kind="instruction", max_length=32, max_new_tokens=8),
    "classification": TaskConfig(kind="classification", max_length=16),
    "multi_label": TaskConfig(kind="multi_label", max_length=16),
    "regression": TaskConfig(kind="regression", max_length=16, outputs=2),
    "preference": TaskConfig(kind="preference", max_length=80, max_new_tokens=8, beta=2.0),
}


@pytest.fixture(scope="module", params=quick(TASKS, "causal_lm"))
def space(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    config = tiny_config(
        tmp_path_factory.mktemp(request.param), rows=ragged_rows(), task=TASKS[request.param], peft=PeftConfig(rank=3, alpha=4.0)
    )
    changes = {
        "instruction": {"prompt": "{question} ->", "answer": " {reply}"},
        "multi_label": {"test_path": None},
        "regression": {"test_path": None},
        "preference": {"test_path": None},
    }
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes.get(request.param, {})))
    return Workspace(config)


def ragged_rows() -> list[dict[str, Any]]:
    """Clients of very different size: 20, 9, 4 and 2 rows."""
    rows = texts(35)
    for i, row in enumerate(rows):
        row["client"] = "c0" if i < 20 else "c1" if i < 29 else "c2" if i < 33 else "c3"
        row |= {"labels": [row["question"], row["reply"]], "target": [i / 10, -i / 20]}
        row |= {"prompt": row["question"], "chosen": row["text"], "rejected": f"the {row['reply']}"}
    return rows


def turn_inputs(space: Workspace, **changes: Any) -> list[TurnInput]:
    rows = {c: space.own.with_reference(space.examples(c, "train")) for c in space.client_ids}
    return turn_inputs_of(rows, space.initial, **changes)


def one_by_one(space: Workspace, todo: list[TurnInput]) -> list[tuple[AdapterState, Any]]:
    return [train_alone(space.live, turn_input, space.config.task, space.pad_id) for turn_input in todo]


def agree(space: Workspace, todo: list[TurnInput]) -> None:
    check(space.live, todo, space.config.task, space.pad_id)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2},
        {"clip_norm": 0.05},
        {"clip_norm": None},
        {"turn": "fedprox", "params": {"mu": 0.5}},
        {"train": ("*.lora_B", "*weight")},
        {"optimizer": "sgd", "lr": 0.3},
        {"turn": "hetlora", "params": {"penalty": 0.3, "share": 0.5}},
        {"measure": ("start_loss",)},
    ],
    ids=["ragged", "accumulated", "clipped", "unclipped", "proximal", "partly trained", "sgd", "tails", "measured"],
)
def test_each_update_is_the_sequential_one(space: Workspace, changes: dict[str, Any]) -> None:
    agree(space, turn_inputs(space, **changes))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_corrections_are_each_clients_own(space: Workspace, optimizer: str) -> None:
    todo = []
    for k, turn_input in enumerate(turn_inputs(space, optimizer=optimizer, turn="scaffold")):
        gen = torch.Generator().manual_seed(k)
        extra = {n: 0.02 * torch.randn(t.shape, generator=gen) for n, t in turn_input.start.tensors.items()}
        todo.append(dataclasses.replace(turn_input, extra=extra if k else {}))  # the first client has no correction
    agree(space, todo)


@pytest.mark.parametrize(("turn", "params"), [("fedprox", {"mu": 0.3}), ("hetlora", {"penalty": 0.2, "share": 0.4})])
def test_plans_of_one_stack_may_differ(space: Workspace, turn: str, params: dict[str, float]) -> None:
    first = next(iter(params))
    mixed = [
        dataclasses.replace(
            j,
            plan=dataclasses.replace(
                j.plan,
                turn=turn,
                params=params | {first: k * params[first]},
                clip_norm=None if k == 2 else 0.1 * (k + 1),
                lr=1e-3 * (k + 1),
            ),
        )
        for k, j in enumerate(turn_inputs(space))
    ]
    agree(space, mixed)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_pefts_modules_take_part_where_no_lean_step_does(space: Workspace, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    monkeypatch.setattr(stacked, "step_of", lambda model: None)
    agree(space, turn_inputs(space, optimizer=optimizer))


def test_the_same_seed_gives_the_same_bits(space: Workspace) -> None:
    first, second = (train_together(space.live, turn_inputs(space), space.config.task, pad_id=space.pad_id) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert not isinstance(a, FedtuneError) and not isinstance(b, FedtuneError)
        assert all(torch.equal(a[0][n], b[0][n]) for n in a[0].tensors)


def test_a_failing_client_does_not_affect_the_others(space: Workspace) -> None:
    todo = turn_inputs(space)
    poison = {n: torch.full_like(t, 1e30) for n, t in todo[1].start.tensors.items()}
    todo[1] = dataclasses.replace(todo[1], start=todo[1].start.replace(poison))
    together = train_together(space.live, todo, space.config.task, pad_id=space.pad_id)
    assert isinstance(together[1], UpdateError) and "step 1 of" in str(together[1])
    for k, (expected, _) in zip((0, 2, 3), one_by_one(space, [todo[k] for k in (0, 2, 3)]), strict=True):
        state = together[k]
        assert not isinstance(state, FedtuneError)
        # AdamW's first steps amplify the rounding of small gradients
        assert all(torch.allclose(state[0][n], expected[n], atol=1e-4) for n in expected.tensors)


def test_the_model_is_unchanged_afterward(space: Workspace) -> None:
    before = space.score(turn_inputs(space)[0].start, space.test_examples(), space.examples("c0", "held_out"))
    train_together(space.live, turn_inputs(space), space.config.task, pad_id=space.pad_id)
    assert space.score(turn_inputs(space)[0].start, space.test_examples(), space.examples("c0", "held_out")) == before


@pytest.mark.parametrize("p", [0.3])
def test_adapter_dropout_draws_from_each_clients_own_seed(tmp_path: Path, p: float) -> None:
    space = Workspace(tiny_config(tmp_path, rows=ragged_rows(), peft=PeftConfig(rank=3, alpha=4.0, dropout=p)))
    agree(space, turn_inputs(space))


@pytest.mark.slow
@pytest.mark.parametrize("batched", quick(["3", "auto"], "3"))
def test_a_run_ends_with_the_sequential_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], batched: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    devices = DevicesConfig(classes={"phone": DeviceClass(offline=0.3, gflops_per_core=1e-3), "laptop": DeviceClass()})
    config = tiny_config(tmp_path, rows=ragged_rows(), rounds=3, devices=devices, eval=EvalConfig(where="server", clients=-1))
    runs = {}
    for mode in ("none", batched):
        path = simulate(dataclasses.replace(config, engine=EngineConfig(threads=1, batched=mode)))
        lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
        runs[mode] = (AdapterState.load(path / "adapter" / "fedtune.safetensors"), lines)
    (train_alone, lines), (together, others) = runs["none"], runs[batched]
    assert max(float((train_alone[n] - together[n]).abs().max()) for n in train_alone.tensors) < 1e-5
    for a, b in zip(lines, others, strict=True):
        assert {k: a.get(k) for k in ("round", "client", "steps", "dropped", "counted")} == {
            k: b.get(k) for k in ("round", "client", "steps", "dropped", "counted")
        }
        assert b.get("loss") == pytest.approx(a.get("loss"), rel=1e-5) and b.get("perplexity") == pytest.approx(
            a.get("perplexity"), rel=1e-4
        )
    assert any("offline" in str(x.get("dropped")) for x in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", quick(["dora", "ia3", "prompt", "prefix", "adapter", "ptuning_v2", "full", "ravan", "fedsb"], "dora"))
def test_a_run_of_any_method_ends_with_the_sequential_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, method: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tiny_config(tmp_path, rows=ragged_rows(), peft=PeftConfig(method=method, rank=2, core=3, tokens=3, bottleneck=4))
    ends = {}
    for mode in ("none", "3", "auto"):
        with caplog.at_level("INFO", "fedtune.batched"):
            path = simulate(dataclasses.replace(config, engine=EngineConfig(threads=1, batched=mode)))
        ends[mode] = AdapterState.load(path / "adapter" / "fedtune.safetensors")
    assert "clients are batched by torch.func.vmap" in caplog.text
    for mode in ("3", "auto"):
        assert max(float((ends["none"][n] - ends[mode][n]).abs().max()) for n in ends["none"].tensors) < 1e-5


def prepare(space: Workspace, turn_input: TurnInput, **plan: Any) -> PreparedTurn:
    return PreparedTurn(
        message=Message(RecordDict(), 1, "train"),
        plan=dataclasses.replace(turn_input.plan, **plan),
        loaded_model=space.own,
        start=turn_input.start,
        sent_bytes=0,
        turn=turn_of(dataclasses.replace(turn_input.plan, **plan)),
        extra={},
        examples=turn_input.examples,
        device_class="",
    )


def test_turns_without_a_batched_form_run_sequentially(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedtune.simulations.engines.together as module

    flower.identify_process(run_id=1)
    turns, alone_, at_once = ["fedpeptao", "slora", "plain", "plain", "slora"], [], []
    params = {"fedpeptao": {"share": False}, "slora": {"stage": "sparse"}, "plain": {}}
    todo = zip([*turn_inputs(space), turn_inputs(space)[0]], turns, strict=True)
    waiting = [prepare(space, turn_input, turn=turn, params=params[turn]) for turn_input, turn in todo]
    monkeypatch.setattr(module, "prepare", lambda host, message, context: waiting[message])
    monkeypatch.setattr(module, "take_turn", lambda host, ready: alone_.append(ready.plan.turn) or [ready])
    monkeypatch.setattr(module.Together, "_train", lambda self, todo: at_once.append([t.plan.turn for t in todo]) or todo)
    together, left = module.Together(host_for(space.config, loaded=space), "4"), list(range(5))
    while left:
        first = left[0]
        done = together._turns(iter([(i, None) for i in left]))  # type: ignore[arg-type]
        left = left[len(done) :]
        assert first not in left
    assert alone_ == ["fedpeptao", "slora", "slora"] and at_once == [["plain", "plain"]]


def test_clients_that_keep_their_optimizer_run_sequentially(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedtune.simulations.engines.together as module

    flower.identify_process(run_id=1)
    waiting = [prepare(space, x, keep_optimizer=True) for x in turn_inputs(space)[:2]]
    monkeypatch.setattr(module, "prepare", lambda host, message, context: waiting[message])
    monkeypatch.setattr(module, "take_turn", lambda host, ready: ready.plan.client)
    together = module.Together(host_for(space.config, loaded=space), "4")
    assert together._turns(iter([(0, None), (1, None)])) == [waiting[0].plan.client]  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("broken", ["count", "neighbor", "lean neighbor", "padding", "scaling", "correction"])
def test_the_check_notices_a_wrong_stack(space: Workspace, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    scaffold = turn_inputs(space, turn="scaffold")
    todo = [dataclasses.replace(j, extra={n: torch.full_like(t, 0.01) for n, t in j.start.tensors.items()}) for j in scaffold]
    if broken == "count":  # divides by one token more
        count = batched._Stack._count
        monkeypatch.setattr(batched._Stack, "_count", lambda self, rows: count(self, rows) + 1)
    elif broken == "lean neighbor":
        rows_of = functions.rows_of
        monkeypatch.setattr(functions, "rows_of", lambda x, like: rows_of(x, like).roll(1, 0) if like.ndim == 3 else x)
    elif broken == "padding":  # the first client's factors for the second's first token
        unpack, pack = places.Places.unpack, places.Places.pack
        monkeypatch.setattr(places.Places, "unpack", lambda self, x: unpack(self, x.roll(1, 0)))
        monkeypatch.setattr(places.Places, "pack", lambda self, x: pack(self, x).roll(-1, 0))
    elif broken == "neighbor":  # a client's rows use the next client's adapter
        monkeypatch.setattr(stacked, "step_of", lambda model: None)
        split = stacked._split
        monkeypatch.setattr(stacked, "_split", lambda batch, x: split(batch, x).roll(1, 0))
    elif broken == "scaling":
        look = batched._Stack._look
        double = lambda self: look(self) or self.client_batch.scaling.update({m: 2 * s for m, s in self.client_batch.scaling.items()})  # noqa: E731
        monkeypatch.setattr(batched._Stack, "_look", double)
    else:  # adds the correction after clipping
        update = batched._Stack._update

        def late(self: Any, grad: Any, clients: Any) -> Any:
            norms = update(self, grad, clients)
            self.flat -= 1e-3 * 0.01
            return norms

        monkeypatch.setattr(BatchedCorrection, "step", lambda self, stack: None)
        monkeypatch.setattr(batched._Stack, "_update", late)
    with pytest.raises(AssertionError):
        agree(space, todo)


def test_too_little_memory_halves_the_batch(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedtune.simulations.engines.together as module

    real, sizes = module.train_together, []
    flower.identify_process(run_id=1)

    def scarce(live: Any, turn_inputs: Any, task: Any, **more: Any) -> Any:
        sizes.append(len(turn_inputs))
        if len(turn_inputs) > 1:
            raise MemoryError
        return real(live, turn_inputs, task, **more)

    monkeypatch.setattr(module, "train_together", scarce)
    todo = [prepare(space, j) for j in turn_inputs(space)]
    replies = module.Together(host_for(space.config, loaded=space), "4")._train(todo)
    assert sizes == [4, 2, 1, 1, 2, 1, 1] and all("update" in r.content.config_records for r in replies)


def test_a_client_that_cannot_finish_is_declined_alone(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedtune.simulations.engines.together as module

    flower.identify_process(run_id=1)
    todo, real = [prepare(space, j) for j in turn_inputs(space)], module.finish

    def full(host: ClientHost, ready: PreparedTurn, *result: Any) -> Message:
        if ready is todo[1]:
            raise CheckpointError("client c1 cannot keep its tensors: free the disk")
        return real(host, ready, *result)

    monkeypatch.setattr(module, "finish", full)
    replies = module.Together(host_for(space.config, loaded=space), "4")._train(todo)
    reasons = [r.content.config_records.get("declined", {}).get("why", "") for r in replies]
    assert reasons == ["", "client c1 cannot keep its tensors: free the disk", "", ""]


def test_a_first_client_that_diverges_does_not_end_the_measurement_of_auto(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import fedtune.simulations.engines.together as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flower.identify_process(run_id=1)
    broken = [prepare(space, j, lr=1e30, lr_last=1e30) for j in turn_inputs(space)]
    monkeypatch.setattr(module, "prepare", lambda host, message, context: broken[message])
    with caplog.at_level("WARNING", "fedtune.batched"):
        replies = module.Together(host_for(space.config, loaded=space), "auto")._turns(iter([(i, None) for i in range(4)]))  # type: ignore[arg-type]
    assert "training at once could not be measured (UpdateError" in caplog.text and not list(tmp_path.rglob("*.json"))
    assert "became" in str(replies[0].content.config_records["declined"]["why"])


def test_auto_is_not_decided_by_a_single_client(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedtune.simulations.engines.together as module

    flower.identify_process(run_id=1)
    todo = [prepare(space, j) for j in turn_inputs(space)]
    monkeypatch.setattr(module, "prepare", lambda host, message, context: todo[message])
    monkeypatch.setattr(module.Together, "_choose", lambda self, todo: 4)
    monkeypatch.setattr(module.Together, "_train", lambda self, todo: todo)
    together = module.Together(host_for(space.config, loaded=space), "auto")
    assert len(together._turns(iter([(0, None)]))) == 1  # type: ignore[arg-type]
    assert len(together._turns(iter([(i, None) for i in range(4)]))) == 4  # type: ignore[arg-type]


@pytest.mark.slow
def test_unbatchable_settings_train_sequentially_and_log_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedtune.simulations.engines.together as module

    config = tiny_config(tmp_path, engine=EngineConfig(threads=1, batched="4"))
    with caplog.at_level("INFO", "fedtune.batched"):
        monkeypatch.setattr(module, "way_of", lambda live, task: (None, "the moon is full"))
        first = simulate(config)
        monkeypatch.setattr(module, "way_of", lambda live, task: (module.train_together, ""))  # a way that fails
        second = simulate(config)
    assert caplog.text.count("clients train one at a time: the moon is full") == 1
    assert "clients could not train at once and did so one at a time (" in caplog.text
    monkeypatch.undo()
    plain = simulate(dataclasses.replace(config, engine=EngineConfig(threads=1, batched="none")))
    files = [(p / "adapter" / "fedtune.safetensors").read_bytes() for p in (plain, first, second)]
    assert files[0] == files[1] == files[2]


def test_clients_evaluated_in_a_batch_store_the_same_and_fail_alone(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    import fedtune.simulations.engines.together as module

    flower.identify_process(run_id=1)
    writer, groups = MessageWriter(1, ()), []
    plans = [Plan(round=2, client="c0", base_version=1, keep=keep) for keep in ((), (), ("*.lora_B",), ())]
    contents = [writer.write(space.initial, held=(), next_plan=plan) for plan in plans]
    messages = [Message(content, node, "evaluate") for node, content in enumerate(contents, 1)]

    def score(host: ClientHost, asked: Any) -> list[Message]:
        groups.append([message.metadata.dst_node_id for message, _ in asked])
        if 2 in groups[-1]:
            raise CheckpointError("client 2's file is damaged")
        return [Message(RecordDict({"metrics": ConfigRecord({"json": "{}"})}), reply_to=message) for message, _ in asked]

    monkeypatch.setattr(module, "evaluate_together", score)
    replies = module.Together(host_for(space.config, loaded=space), "4")._score([(m, None) for m in messages])  # type: ignore[arg-type]
    assert groups == [[1, 2, 4], [1], [2], [4]]  # node 3 keeps its own lora_B
    assert ["declined" in r.content.config_records for r in replies] == [False, True, False]


def test_clients_evaluated_in_a_batch_have_their_own_metrics(space: Workspace) -> None:
    state = turn_inputs(space)[0].start
    groups = [space.examples(c, "train") for c in space.client_ids]
    together = space.score(state, *groups[:2], [], *groups[2:])
    assert together.pop(2) == {}
    for group, metrics in zip(groups, together, strict=True):
        (train_alone,) = space.score(state, group)
        assert metrics.keys() == train_alone.keys() and all(metrics[k] == pytest.approx(train_alone[k], rel=1e-5) for k in train_alone)


def test_mixed_ranks_share_a_stack(tmp_path: Path) -> None:
    wide, narrow = (Workspace(tiny_config(tmp_path, rows=ragged_rows(), peft=PeftConfig(rank=r, alpha=4.0))) for r in (3, 2))
    todo = [j for k, (w, n) in enumerate(zip(turn_inputs(wide), turn_inputs(narrow), strict=True)) for j in [n if k % 2 else w]]
    together = train_together(wide.live, todo, wide.config.task, pad_id=wide.pad_id)
    for k, (turn_input, actual) in enumerate(zip(todo, together, strict=True)):
        ((expected, turn),) = one_by_one(narrow if k % 2 else wide, [turn_input])
        assert not isinstance(actual, FedtuneError) and actual[0].spec.ranks == expected.spec.ranks
        moved = math.sqrt(sum(float((expected[n] - turn_input.start[n]).square().sum()) for n in expected.tensors))
        apart = math.sqrt(sum(float((expected[n] - actual[0][n]).square().sum()) for n in expected.tensors))
        assert apart <= 1e-4 * moved and actual[1].steps == turn.steps

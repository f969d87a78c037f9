"""A turn equals a bare training loop."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.steps import batches, steps_of
from fedtune.clients.store import ClientStore, Storage
from fedtune.clients.trainer import train
from fedtune.clients.turns import Work
from fedtune.clients.workspace import Workspace, workspace
from fedtune.config import ClientConfig, Config, DataConfig, PartitionConfig, check, to_dict
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.wire import ServerMessage
from fedtune.data import collate
from fedtune.errors import PlanError, UpdateError
from fedtune.experiment import simulate
from fedtune.models import loss_sum
from fedtune.rounds.bridge import Bridge
from fedtune.runs.report import read_metrics
from tests.fakes import fake_bridge as make_bridge
from tests.quick import quick
from tests.tiny import texts, tiny_config
from tests.working import host_for, work_in


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tiny_config(tmp_path_factory.mktemp("trainer")))


def start(space: Workspace) -> AdapterState:
    state = space.initial
    gen = torch.Generator().manual_seed(1)  # B away from zero, so that A has gradients too
    return state.replace({n: t + 0.05 * torch.randn(t.shape, generator=gen) for n, t in state.tensors.items()})


def turn(space: Workspace, client: str = "c0", **changes: Any) -> tuple[AdapterState, Any]:
    plan = dataclasses.replace(
        Plan(round=1, client=client, base_version=0, steps=3, epochs=None, batch_size=4, lr=1e-2, lr_last=1e-2), **changes
    )
    space.live.load(start(space))
    turned = train(work_in(space, plan))
    return space.live.read(version=0), turned


def distance(a: AdapterState, b: AdapterState) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a.tensors)


def bare_loop(space: Workspace, rounds: int, seeds: list[int], client: ClientConfig) -> dict[str, torch.Tensor]:
    """Plain centralized training: transformers' loss, PEFT's model, one optimizer per round."""
    model = AutoModelForCausalLM.from_pretrained(space.config.model.name)
    targets = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets)).train()
    names = {n.removeprefix("base_model.model.").replace(".default.weight", ""): p for n, p in model.named_parameters() if p.requires_grad}
    initial = space.initial
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(initial[name])
    examples = space.examples(space.client_ids[0], "train")
    for seed in seeds[:rounds]:
        optimizer = torch.optim.AdamW(names.values(), lr=client.lr, weight_decay=client.weight_decay)
        order = batches(len(examples), client.batch_size, seed)
        for _ in range(client.steps or 0):
            loss = model(**collate([examples[i] for i in next(order)], space.pad_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(names.values(), client.clip_norm or 1e9)
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach() for n, p in names.items()}


def federate(config: Config, path: Path) -> tuple[AdapterState, list[int]]:
    """Run bridge, messages and ClientApp. Returns the last adapter and the seed of each turn of the first client."""
    space = workspace(json.dumps(to_dict(config)))
    bridge, _ = make_bridge(path, make_client_app(host_for(config, loaded=space)), len(space.client_ids), config, initial=space.initial)
    bridge = dataclasses.replace(bridge, evaluate=None)
    assert isinstance(bridge, Bridge)
    from fedtune.rounds.planning import base_plan

    return bridge.loop().adapter, [base_plan(config, r, space.client_ids[0], r - 1).seed for r in range(1, config.rounds + 1)]


@pytest.mark.slow
def test_one_client_with_all_the_data_is_centralized_training(tmp_path: Path) -> None:
    client = ClientConfig(steps=4, epochs=None, batch_size=4, lr=1e-2, schedule="constant", clip_norm=0.5, weight_decay=0.01)
    config = tiny_config(tmp_path, partition=PartitionConfig(kind="iid", clients=1), rounds=3, clients_per_round=1, client=client)
    for rounds in (1, 2, 3):
        actual, seeds = federate(dataclasses.replace(config, rounds=rounds), tmp_path / f"run{rounds}")
        expected = bare_loop(workspace(json.dumps(to_dict(dataclasses.replace(config, rounds=rounds)))), rounds, seeds, client)
        assert max(float((actual[n] - expected[n]).abs().max()) for n in expected) < 1e-5
        assert float(sum(actual[n].abs().sum() for n in expected if n.endswith("lora_B"))) > 0.01  # training changed the adapter


def test_identical_clients_are_one_client(tmp_path: Path) -> None:
    rows = texts(10)
    copies = [{**row, "client": c} for c in ("a", "b", "c") for row in rows]
    data = {
        "client": ClientConfig(steps=3, epochs=None, batch_size=64, lr=1e-2, schedule="constant")
    }  # one batch has all rows, so their order does not matter
    (tmp_path / "many").mkdir()
    (tmp_path / "one").mkdir()

    def whole(folder: Path, rows: list[dict[str, Any]]) -> Config:
        config = tiny_config(folder, rows, **data)
        return dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.0))

    many, _ = federate(whole(tmp_path / "many", copies), tmp_path / "r1")
    one, _ = federate(whole(tmp_path / "one", [r for r in copies if r["client"] == "a"]), tmp_path / "r2")
    assert distance(many, one) < 1e-5


def test_accumulation_is_exact_over_ragged_micro_batches(space: Workspace) -> None:
    whole, _ = turn(space, batch_size=8, steps=1, clip_norm=None)
    parts, _ = turn(space, batch_size=2, accumulate=4, steps=1, clip_norm=None)
    # AdamW's first step is lr·sign(g) nearly everywhere: a mean of means would show in few entries only, see the next test for the gradient
    assert distance(whole, parts) < 1e-4
    assert len({len(e.input_ids) for e in space.examples("c0", "train")}) > 2


def test_the_gradient_of_accumulated_micro_batches_is_that_of_one_batch(space: Workspace) -> None:
    from fedtune.clients.trainer import _backward

    examples, grads, task = space.examples("c0", "train")[:7], [], space.config.task

    def loss(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return loss_sum(space.live.model, batch, task)

    for groups in ([examples], [examples[:1], examples[1:3], examples[3:]]):
        space.live.load(start(space))
        _backward([collate(g, space.pad_id) for g in groups], loss, task, torch.device("cpu"))
        grads.append([p.grad.clone() for p in space.live.parameters.values() if p.grad is not None])
        for p in space.live.parameters.values():
            p.grad = None
    assert max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True)) < 1e-6
    assert max(float(g.abs().max()) for g in grads[0]) > 1e-3


def test_the_same_seed_gives_the_same_bits_and_another_does_not(space: Workspace) -> None:
    assert distance(turn(space, seed=1)[0], turn(space, seed=1)[0]) == 0.0
    assert distance(turn(space, seed=1)[0], turn(space, seed=2)[0]) > 1e-4


def test_every_pass_has_a_new_permutation() -> None:
    stream = batches(10, 4, seed=0)
    passes = [[next(stream) for _ in range(3)] for _ in range(3)]
    assert all([len(b) for b in p] == [4, 4, 2] and sorted(sum(p, [])) == list(range(10)) for p in passes)
    assert len({str(p) for p in passes}) == 3 and passes[0] != [next(batches(10, 4, seed=1))]


@pytest.mark.parametrize(
    ("plan", "examples", "steps"),
    [
        ({"steps": 7}, 3, 7),
        ({"epochs": 2.0}, 33, 17),
        ({"epochs": 0.01}, 5, 1),
        ({"epochs": 1.0, "accumulate": 2}, 33, 5),
    ],
)
def test_the_number_of_steps(plan: dict[str, Any], examples: int, steps: int) -> None:
    # 33 rows, 2 passes, batches of 4: 16.5 → 17 steps; with 2 micro-batches a step: 33 / 8 → 5
    turn_plan = Plan(**{"round": 1, "client": "a", "base_version": 0, "steps": None, "epochs": None, "batch_size": 4, **plan})
    assert steps_of(turn_plan, examples) == steps


@pytest.mark.parametrize(
    ("schedule", "sums"), quick([("constant", (0.02, 0.02)), ("linear", (0.0175, 0.0075))], ("linear", (0.0175, 0.0075)))
)
def test_the_sum_of_the_rates_follows_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, sums: tuple[float, float]
) -> None:
    applied, right = list[float](), torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> Any:
        applied.append(self.param_groups[0]["lr"])
        return right(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    client = ClientConfig(steps=2, epochs=None, batch_size=4, lr=1e-2, schedule=schedule, lr_end=0.0)
    run = simulate(check(tiny_config(tmp_path, client=client)))
    rates = [r["lr_sum"] for r in read_metrics(run) if r["client"] is not None and r["round"] > 0]
    # by hand, two rounds of two steps from .01 down to 0: .01 + .0075 and .005 + .0025
    assert rates == pytest.approx([sums[0]] * 4 + [sums[1]] * 4)
    # the reported sum equals the optimizer's: SCAFFOLD, FedNova and the bound on an update's norm divide by it
    assert rates == pytest.approx([sum(applied[i : i + 2]) for i in range(0, len(applied), 2)])


def test_only_the_plans_tensors_are_trained(space: Workspace) -> None:
    before = start(space)
    after, _ = turn(space, train=("*.lora_B",))
    for name in after.tensors:
        assert torch.equal(before[name], after[name]) is name.endswith("lora_A")
    assert all(p.requires_grad for p in space.live.parameters.values())


def test_the_backbone_never_changes(space: Workspace) -> None:
    frozen = {n: p for n, p in space.live.model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in frozen.items()}
    turn(space, lr=1.0, lr_last=1.0)
    assert len(frozen) > 10 and all(torch.equal(p, before[n]) for n, p in frozen.items())


def prox(mu: float) -> dict[str, Any]:
    return {"turn": "fedprox", "params": {"mu": mu}}


def test_prox_keeps_the_weights_near_the_start(space: Workspace) -> None:
    begin = start(space)
    ends = [turn(space, steps=8, **prox(mu))[0] for mu in (0.0, 1.0, 100.0)]
    moved = [sum(float((end[n] - begin[n]).norm()) for n in begin.tensors) for end in ends]
    assert moved[0] > moved[1] > moved[2]


def test_the_gradient_of_prox_by_hand(space: Workspace) -> None:
    # at the anchor itself the proximal term has no gradient: the first step is the same with and without it
    assert distance(turn(space, steps=1)[0], turn(space, steps=1, **prox(10.0))[0]) == 0.0


def gradients(space: Workspace, examples: int = 4) -> dict[str, torch.Tensor]:
    """Of the mean loss over the first batch of a turn, at its start."""
    space.live.load(start(space))
    rows = space.examples("c0", "train")
    batch = collate([rows[i] for i in next(batches(len(rows), examples, 0))], space.pad_id)
    loss, count = loss_sum(space.live.model, batch, space.config.task)
    (loss / count).backward()
    result = {n: p.grad.clone() for n, p in space.live.parameters.items() if p.grad is not None}
    for p in space.live.parameters.values():
        p.grad = None
    return result


def test_sgd_a_correction_and_decay_by_hand(space: Workspace) -> None:
    # w ← w·(1 − lr·decay) − lr·(g + correction), one step, no clipping
    begin, grad = start(space), gradients(space)
    correction = {n: torch.full_like(t, 0.3) for n, t in begin.tensors.items() if n.endswith("lora_B")}
    plan = Plan(round=1, client="c0", base_version=0, steps=1, epochs=None, batch_size=4, lr=0.1, lr_last=0.1)
    plan = dataclasses.replace(plan, optimizer="sgd", weight_decay=0.5, clip_norm=None)
    space.live.load(begin)
    train(work_in(space, dataclasses.replace(plan, turn="scaffold"), extra=correction))
    after = space.live.read(version=0)
    for name, w in begin.tensors.items():
        expected = w * (1 - 0.1 * 0.5) - 0.1 * (grad[name] + correction.get(name, torch.zeros(())))
        assert torch.allclose(after[name], expected, atol=1e-6), name


def test_the_tail_penalty_by_hand(space: Workspace) -> None:
    # rank 2, share .5: the tail is row 1 of A and column 1 of B; d(λ‖b‖‖a‖)/da = λ‖b‖·a/‖a‖
    begin, grad = start(space), gradients(space)
    plan = Plan(round=1, client="c0", base_version=0, steps=1, epochs=None, batch_size=4, lr=0.1, lr_last=0.1)
    plan = dataclasses.replace(plan, optimizer="sgd", clip_norm=None, turn="hetlora", params={"penalty": 0.7, "share": 0.5})
    space.live.load(begin)
    train(work_in(space, plan, start=begin))
    after, module = space.live.read(version=0), next(iter(begin.spec.ranks))
    a, b = begin[f"{module}.lora_A"][1], begin[f"{module}.lora_B"][:, 1]
    expected = begin[f"{module}.lora_A"] - 0.1 * grad[f"{module}.lora_A"]
    assert torch.allclose(after[f"{module}.lora_A"][0], expected[0], atol=1e-6)
    assert torch.allclose(after[f"{module}.lora_A"][1], expected[1] - 0.1 * 0.7 * b.norm() * a / a.norm(), atol=1e-6)


def test_the_start_loss_is_that_of_all_rows_before_the_first_step(space: Workspace) -> None:
    _, turned = turn(space, measure=("start_loss",))
    rows = space.examples("c0", "train")
    space.live.load(start(space))
    with torch.no_grad():
        loss, count = loss_sum(space.live.model, collate(rows, space.pad_id), space.config.task)
    assert turned.start_loss == pytest.approx(loss.item() / count, rel=1e-5) and turn(space)[1].start_loss is None


def test_the_loss_of_a_turn_is_the_mean_over_its_tokens(space: Workspace) -> None:
    # one pass over all rows, without a change
    _, turned = turn(space, lr=0.0, lr_last=0.0, steps=None, epochs=1, batch_size=3, measure=("start_loss",))
    assert turned.steps > 1 and turned.loss == pytest.approx(turned.start_loss, rel=1e-5)


def test_a_diverging_loss_is_an_error(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_loss(*args: Any) -> tuple[torch.Tensor, int]:
        return torch.tensor(float("nan"), requires_grad=True), 1

    monkeypatch.setattr("fedtune.clients.turns._base.loss_sum", nan_loss)
    with pytest.raises(UpdateError, match="the training loss became nan in step 1 of 3: lower client.lr"):
        turn(space)
    assert all(p.grad is None and p.requires_grad for p in space.live.parameters.values())


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        pytest.param(MemoryError(), "failed: out of memory: lower client.batch_size", marks=pytest.mark.slow),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: not enough memory"),
            "failed: out of memory",
        ),
        pytest.param(ZeroDivisionError("oops"), "failed: ZeroDivisionError: oops", marks=pytest.mark.slow),
    ],
)
def test_a_failing_turn_ends_that_clients_round_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    import fedtune.clients.app as app

    real = app.train

    def break_turn(work: Work, *more: Any, **how: Any) -> Any:
        if work.plan.client == "c1":
            raise error
        return real(work, *more, **how)

    monkeypatch.setattr(app, "train", break_turn)
    config = tiny_config(tmp_path)
    space = workspace(json.dumps(to_dict(config)))
    bridge, observer = make_bridge(tmp_path / "r", make_client_app(host_for(config, loaded=space)), 4, config, initial=space.initial)
    state = dataclasses.replace(bridge, evaluate=None).loop()
    assert state.adapter.spec.version == 2 and [r["counted"] for r in observer.records[1:]] == [3, 3]
    assert all(sentence in r["dropped"] for r in observer.clients if r["client"] == "c1" and r["round"])


def test_held_out_rows_are_not_trained_on(space: Workspace) -> None:
    for rows in space.federation.clients.values():
        assert not set(rows.train.tolist()) & set(rows.held_out.tolist())


def test_data_config_of_a_run_is_part_of_the_workspace_key(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    other = dataclasses.replace(config, data=DataConfig(**{**dataclasses.asdict(config.data), "held_out": 0.0}))
    first, second = (workspace(json.dumps(to_dict(c))) for c in (config, other))
    assert first is not second and workspace(json.dumps(to_dict(other))) is second


def shift_of(space: Workspace, version: int) -> AdapterState:
    module = next(iter(space.live.spec.ranks))
    shapes = space.live.parameters[f"{module}.lora_A"].shape[1], space.live.parameters[f"{module}.lora_B"].shape[0]
    tensors = {f"{module}.lora_A": torch.full((1, shapes[0]), 0.1 * version), f"{module}.lora_B": torch.ones(shapes[1], 1)}
    spec = AdapterSpec(method="lora", base=space.backbone.fingerprint, version=version, ranks={module: 1}, scaling={module: 1.0})
    return AdapterState(tensors, spec)


def test_shifts_are_merged_once_replayed_after_a_gap_and_reset(tmp_path: Path) -> None:
    space = Workspace(tiny_config(tmp_path))
    module = next(iter(space.live.spec.ranks))
    weight = space.backbone.model.get_submodule(module).get_parameter("base_layer.weight")
    w0, one, two = weight.clone(), shift_of(space, 1), shift_of(space, 2)
    space.rebase((1,), [one])
    space.rebase((1, 2), [one, two])  # sent again, but merged only once
    assert torch.allclose(weight - w0, torch.full_like(w0, 0.3), atol=1e-6) and space.frozen.versions == (1, 2)
    space.rebase((1,), [one])  # a server that resumes from round 1
    assert torch.allclose(weight - w0, torch.full_like(w0, 0.1), atol=1e-6)
    with pytest.raises(PlanError, match="the shift of round 2 is neither merged on this client nor in the message: restart"):
        space.rebase((1, 2), [])
    space.rebase((), [])
    assert torch.equal(weight, w0)


def test_own_tensors_take_precedence_over_received_and_initial_ones(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    host = ClientHost(config, Storage(ClientStore(tmp_path / "clients", 2)))
    space = host.space
    full = space.initial.replace({n: torch.full_like(t, 5.0) for n, t in space.initial.tensors.items()})
    sent = full.subset([n for n in full.tensors if n.endswith("lora_A")])
    request = ServerMessage(round=3, adapter=sent, keep=("*.lora_B",), plan=Plan(round=3, client="c0", base_version=2))
    first = host.complete("c0", request)
    assert list(first.tensors) == list(space.live.parameters)
    assert all(torch.equal(t, full[n] if n.endswith("lora_A") else space.initial[n]) for n, t in first.tensors.items())
    host.storage.store.write("c0", 3, full.subset([n for n in full.tensors if n.endswith("lora_B")]))
    assert torch.equal(host.complete("c0", request)[n := next(n for n in full.tensors if n.endswith("lora_B"))], space.initial[n])
    evaluation = dataclasses.replace(request, plan=None)  # it comes after the round's turn
    assert all(torch.equal(t, full[n]) for n, t in host.complete("c0", evaluation).tensors.items())
    assert torch.equal(host.complete("c1", evaluation)[n], space.initial[n])
    assert host.complete("c0", ServerMessage(round=3, adapter=full)) is full

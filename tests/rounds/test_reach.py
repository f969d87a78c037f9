"""The largest distance of an update from the sent tensors, and other bounds on a reply."""

import json
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment
from fedtune.errors import UpdateError, UpdateMismatch
from fedtune.rounds import reply
from fedtune.rounds.reply import read_update
from tests.fakes import lora_state

REACH = 3 * 0.01 * (1 - 0.9) / (1 - 0.999) ** 0.5  # three steps of AdamW at 0.01: 0.0949 an entry


@pytest.mark.parametrize(
    ("moved", "plan", "sentence"),
    [
        (REACH, {}, None),
        (1.6 * REACH, {}, "moves an entry of 'q.lora_A' by 0.152, but 3 steps of the plan move it by at most 0.142"),
        (0.03, {"optimizer": "sgd", "clip_norm": 1.0}, None),  # 3 · 0.01 · 1
        (0.05, {"optimizer": "sgd", "clip_norm": 1.0}, "3 steps of the plan move it by at most 0.045"),
        (1e6, {"optimizer": "sgd", "clip_norm": None}, None),  # without clipping there is no bound
        (1.0, {"privacy": "user", "dp_noise": 1.0, "dp_turns": 1}, None),  # mostly noise
        (1.0, {"codec": "topk=0.1+fp32+feedback"}, None),  # includes the residual of earlier updates
    ],
)
def test_an_update_farther_than_its_steps_allow_is_refused(moved: float, plan: dict[str, Any], sentence: str | None) -> None:
    start = lora_state(fill=0.0)
    assignment = Assignment(
        plan=Plan(round=1, client="a", base_version=0, steps=3, epochs=None, lr=0.01, lr_last=0.01, **plan), adapter=start
    )
    sent = start.replace({n: torch.full_like(t, moved) for n, t in start.tensors.items()})
    update = Update(client="a", round=1, base_version=0, adapter=sent, examples=1, measurements={"steps": 3, "lr_sum": 0.03})
    if sentence is None:
        reply._check_reach(update, assignment)
    else:
        with pytest.raises(UpdateError, match=sentence):
            reply._check_reach(update, assignment)


@pytest.mark.parametrize(("moved", "accepted"), [(0.5, True), (1.0, False)])
def test_a_turn_that_recombines_has_a_bound_for_each_tensor(moved: float, accepted: bool) -> None:
    """Three steps move an entry by 1.5 · 0.0949 = 0.142; q.lora_B, (3, 2), then by at most √6 · 0.142 · 1.142 = 0.398 without a norm."""
    start = lora_state(fill=0.0).replace({n: torch.full_like(t, 0.1) for n, t in lora_state(fill=0.0).tensors.items()})
    plan = Plan(round=1, client="a", base_version=0, steps=3, epochs=None, lr=0.01, lr_last=0.01)
    sent = start.replace({n: t + moved if n == "q.lora_B" else t for n, t in start.tensors.items()})
    update = Update(client="a", round=1, base_version=0, adapter=sent, examples=1, measurements={"steps": 3, "lr_sum": 0.03})
    for recombines in (False, True):
        assignment = Assignment(plan=plan, adapter=start, recombines=recombines)
        if recombines and accepted:
            reply._check_reach(update, assignment)
        else:
            with pytest.raises(UpdateError, match="moves an entry of 'q.lora_B'"):
                reply._check_reach(update, assignment)


def test_adamw_stays_within_the_bound_for_worst_case_gradients() -> None:
    """The worst case: a huge gradient after many zero gradients, repeatedly."""
    w = torch.zeros(1, requires_grad=True)
    optimizer, farthest = torch.optim.AdamW([w], lr=1.0, weight_decay=0.0), 0.0
    for step in range(6000):
        w.grad = torch.full((1,), 1e3 if step % 5000 == 4999 else 0.0)
        before = w.item()
        optimizer.step()
        farthest = max(farthest, abs(w.item() - before))
    assert 3.0 < farthest <= (1 - 0.9) / (1 - 0.999) ** 0.5


def test_a_plan_in_epochs_bounds_the_steps_by_the_rows() -> None:
    start = lora_state(fill=0.0)
    assignment = Assignment(plan=Plan(round=1, client="a", base_version=0, epochs=2.0, batch_size=4), adapter=start)
    for steps, good in ((5, True), (6, False)):  # 10 rows twice, four at a time: 5 steps
        update = Update(
            client="a", round=1, base_version=0, adapter=start, examples=10, measurements={"steps": steps, "lr_sum": steps * 1e-3}
        )
        record = ConfigRecord({"json": update.to_json(), "spec": start.spec.to_json()})
        content = RecordDict({"adapter": start.to_arrays(), "update": record})
        if good:
            assert read_update(content, assignment, examples=10).measurements["steps"] == 5
        else:
            with pytest.raises(UpdateError, match="reports 6 steps; the plan allows at most 5"):
                read_update(content, assignment, examples=10)


def test_a_client_may_prune_ranks_only_if_the_assignment_allows_it() -> None:
    sent, shorter = lora_state(), dict(lora_state().tensors)
    shorter |= {"q.lora_A": torch.ones(1, 5), "q.lora_B": torch.ones(3, 1)}
    pruned = sent.replace(shorter, ranks={"q": 1, "up": 1})
    for may in (True, False):
        plan = Plan(round=1, client="a", base_version=0, lr=1.0, lr_last=1.0, steps=3)
        paid = {"steps": 3, "lr_sum": 3.0}
        update = Update(client="a", round=1, base_version=0, adapter=pruned, examples=1, measurements=paid)
        record = ConfigRecord({"json": update.to_json(), "spec": pruned.spec.to_json()})
        reply = RecordDict({"adapter": pruned.to_arrays(), "update": record})
        if may:
            assert read_update(reply, Assignment(plan=plan, adapter=sent, may_prune=True)).adapter.spec.ranks == {"q": 1, "up": 1}
            with pytest.raises(UpdateMismatch, match="ranks or scaling differ"):  # more than it received
                read_update(reply, Assignment(plan=plan, adapter=pruned.replace(ranks={"q": 0, "up": 1}), may_prune=True))
        else:
            with pytest.raises(UpdateMismatch, match="ranks or scaling differ"):
                read_update(reply, Assignment(plan=plan, adapter=sent))


def test_an_update_on_other_bases_is_refused() -> None:
    sent = AdapterState({"q.core": torch.zeros(1, 2, 2)}, AdapterSpec(method="fedsb", basis="1"))
    plan = Plan(round=1, client="a", base_version=0, steps=3)
    update = Update(client="a", round=1, base_version=0, adapter=sent, examples=1, measurements={"steps": 3, "lr_sum": 0.003})
    for basis in ("1", "2", ""):
        record = ConfigRecord({"json": update.to_json(), "spec": sent.replace(basis=basis).spec.to_json()})
        content = RecordDict({"adapter": sent.to_arrays(), "update": record})
        if basis == "1":
            assert read_update(content, Assignment(plan=plan, adapter=sent)).adapter.spec == sent.spec
        else:
            with pytest.raises(UpdateMismatch, match="the update's basis differs from that of the adapter that the server sent"):
                read_update(content, Assignment(plan=plan, adapter=sent))


def test_a_client_s_metrics_are_limited_in_number_and_name_length() -> None:
    reported = {"accuracy": 0.5, "m" * 65: 1.0, "x\n": 1.0, "round": 3} | {f"m{i}": 1.0 for i in range(1000)}
    kept = reply.read_metrics(RecordDict({"metrics": ConfigRecord({"json": json.dumps(reported)})}))
    assert kept == {"accuracy": 0.5} | {f"m{i}": 1.0 for i in range(60)}

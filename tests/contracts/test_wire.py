"""A server's message comes out as it went in, holds nothing that was not asked for, and is refused where it is not one of ours."""

import torch
from flwr.app import ConfigRecord, RecordDict
from pytest import raises

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.wire import Envelopes, read_letter
from fedtune.errors import PlanError, UpdateMismatch
from tests.fakes import lora_state

PLAN = Plan(round=4, client="c", base_version=3, keep=("*.lora_B",), rank=2, measure=("start_loss",))


def shift(version: int) -> AdapterState:
    tensors = {"q.lora_A": torch.full((3, 5), float(version)), "q.lora_B": torch.ones(3, 3)}
    return AdapterState(tensors, AdapterSpec(method="lora", base="b" * 64, version=version, ranks={"q": 3}, scaling={"q": 1.0}))


def test_a_letter_reads_as_it_was_written() -> None:
    adapter, extra = lora_state(seed=1), {"head.weight": torch.full((4, 7), 0.5)}
    envelopes = Envelopes(4, [shift(1), shift(2), shift(3)])
    content = envelopes.write(adapter, held=(1, 2), plan=PLAN, extra=extra)
    assert set(content.array_records) == {"adapter", "extra", "shift-3"}  # of the shifts only the one that is missing
    letter = read_letter(content)
    assert (letter.round, letter.base, letter.keep, letter.plan) == (4, (1, 2, 3), ("*.lora_B",), PLAN)
    assert letter.adapter.spec == adapter.spec and all(torch.equal(letter.adapter[n], t) for n, t in adapter.tensors.items())
    assert torch.equal(letter.extra["head.weight"], extra["head.weight"])
    assert [s.spec for s in letter.shifts] == [shift(3).spec] and torch.equal(letter.shifts[0]["q.lora_A"], shift(3)["q.lora_A"])


def test_what_many_get_is_encoded_once() -> None:
    adapter, envelopes = lora_state(), Envelopes(1, [shift(1)])
    a, b = (envelopes.write(adapter, held=()) for _ in range(2))
    assert a["adapter"] is b["adapter"] and a["shift-1"] is b["shift-1"]
    assert read_letter(a).plan is None and "plan" not in a


def test_what_is_no_letter_of_ours_is_refused_by_name() -> None:
    content = Envelopes(1, []).write(lora_state(), held=())
    for broken in (
        {k: v for k, v in content.items() if k != "frame"},
        {**content, "frame": ConfigRecord({"json": "[]"})},
        {**content, "frame": ConfigRecord({"json": '{"round": 1, "base": 7, "keep": []}'})},
    ):
        with raises(PlanError, match="the server's message cannot be read"):
            read_letter(RecordDict(broken))  # type: ignore[arg-type]
    with raises(UpdateMismatch, match="the adapter's spec lacks the field 'method'"):
        read_letter(RecordDict({**content, "spec": ConfigRecord({"json": "{}"})}))  # type: ignore[dict-item]

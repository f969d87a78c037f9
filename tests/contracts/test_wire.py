"""Server messages are read as they were written, contain only what the client needs, and are refused if they are not valid."""

import torch
from flwr.app import ConfigRecord, RecordDict
from pytest import raises

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.wire import MessageWriter, read_message
from fedtune.errors import PlanError, UpdateMismatch
from tests.fakes import lora_state

PLAN = Plan(round=4, client="c", base_version=3, keep=("*.lora_B",), rank=2, measure=("start_loss",))


def shift(version: int) -> AdapterState:
    tensors = {"q.lora_A": torch.full((3, 5), float(version)), "q.lora_B": torch.ones(3, 3)}
    return AdapterState(tensors, AdapterSpec(method="lora", base="b" * 64, version=version, ranks={"q": 3}, scaling={"q": 1.0}))


def test_a_message_is_read_as_it_was_written() -> None:
    adapter, extra = lora_state(seed=1), {"head.weight": torch.full((4, 7), 0.5)}
    writer = MessageWriter(4, [shift(1), shift(2), shift(3)])
    content = writer.write(adapter, held=(1, 2), plan=PLAN, extra=extra)
    assert set(content.array_records) == {"adapter", "extra", "shift-3"}  # only the missing shift
    received = read_message(content)
    assert (received.round, received.base, received.keep, received.plan) == (4, (1, 2, 3), ("*.lora_B",), PLAN)
    assert received.adapter.spec == adapter.spec and all(torch.equal(received.adapter[n], t) for n, t in adapter.tensors.items())
    assert torch.equal(received.extra["head.weight"], extra["head.weight"])
    assert [s.spec for s in received.shifts] == [shift(3).spec] and torch.equal(received.shifts[0]["q.lora_A"], shift(3)["q.lora_A"])


def test_shared_tensors_are_encoded_once() -> None:
    adapter, writer = lora_state(), MessageWriter(1, [shift(1)])
    a, b = (writer.write(adapter, held=()) for _ in range(2))
    assert a["adapter"] is b["adapter"] and a["shift-1"] is b["shift-1"]
    assert read_message(a).plan is None and "plan" not in a


def test_an_invalid_message_is_refused() -> None:
    content = MessageWriter(1, []).write(lora_state(), held=())
    for broken in (
        {k: v for k, v in content.items() if k != "frame"},
        {**content, "frame": ConfigRecord({"json": "[]"})},
        {**content, "frame": ConfigRecord({"json": '{"round": 1, "base": 7, "keep": []}'})},
    ):
        with raises(PlanError, match="the server's message cannot be read"):
            read_message(RecordDict(broken))  # type: ignore[arg-type]
    with raises(UpdateMismatch, match="the adapter's spec lacks the field 'method'"):
        read_message(RecordDict({**content, "spec": ConfigRecord({"json": "{}"})}))  # type: ignore[dict-item]

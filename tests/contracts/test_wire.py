"""Server messages are read as they were written, contain only what the client needs, and are refused if they are not valid."""

import dataclasses

import torch
from flwr.app import ConfigRecord, RecordDict
from pytest import raises

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.hello import ClientHello
from fedtune.contracts.plan import Plan
from fedtune.contracts.wire import MessageWriter, read_message, read_offer, start_in
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


def test_the_start_is_sent_once_and_only_where_the_adapter_omits_tensors() -> None:
    start, whole = lora_state(seed=2), lora_state(seed=1)
    part, writer = whole.subset(["q.lora_B", "up.lora_B", "head.weight"]), MessageWriter(1, [shift(1)], start=start)
    first, again, full = writer.write(part, held=()), writer.write(part, held=(), started=start.digest), writer.write(whole, held=())
    assert ["start" in content.array_records for content in (first, again, full)] == [True, False, False]
    assert "start" in writer.write(part, held=(), started="of another run").array_records
    received = read_message(first)
    assert received.start is not None and received.start_digest == received.start.digest == start.digest == start_in(first)
    assert received.start.spec == start.spec and all(torch.equal(received.start[n], t) for n, t in start.tensors.items())
    assert received.nbytes == part.nbytes + start.nbytes + shift(1).nbytes
    assert (read_message(again).start_digest, read_message(again).start, start_in(again)) == (start.digest, None, "")
    assert (read_message(full).start_digest, start_in(full)) == ("", "")
    other = part.replace(method="sparse")  # such as SLoRA's first stage, which a client does not complete
    assert read_message(writer.write(other, held=())).start_digest == ""


def test_an_offer_announces_the_start_too() -> None:
    start, part = lora_state(seed=2), lora_state(seed=1).subset(["head.weight"])
    writer = MessageWriter(1, [shift(1)], start=start)
    content = writer.write(part, held=(), plan=PLAN)
    offer = writer.offer(content, part, ())
    assert offer is not None and read_offer(offer)[1] == part.nbytes + start.nbytes + shift(1).nbytes


def test_without_a_warm_start_nothing_on_the_wire_changes() -> None:
    frame = str(MessageWriter(1, []).write(lora_state().subset(["head.weight"]), held=()).config_records["frame"]["json"])
    assert "start" not in frame
    hello = ClientHello(client="a", device_class="", examples=1, held_out=0, base="b", shifts=(), remembers=True)
    assert "start" not in hello.to_json() and ClientHello.from_json(hello.to_json()) == hello
    assert ClientHello.from_json(dataclasses.replace(hello, start="d").to_json()).start == "d"


def test_the_digest_depends_on_every_value_but_not_on_the_order() -> None:
    state = lora_state(seed=1)
    turned = AdapterState(dict(reversed(list(state.tensors.items()))), state.spec)
    assert turned.digest == state.digest
    moved = state["head.weight"].clone()
    moved[3, 6] += 1e-6
    assert len({s.digest for s in (state, state.replace({**state.tensors, "head.weight": moved}), state.replace(version=1))}) == 3

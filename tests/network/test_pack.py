"""Hundreds of small tensors are sent as one and round-trip."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedtune.contracts import flower
from fedtune.network import pack as packing
from fedtune.network._flwr_client import get_all_nested_objects
from fedtune.network.pack import KIND, NAME, WHOLE, is_packed, pack, unpack


def message(content: RecordDict) -> Message:
    flower.identify_process(1)
    return Message(content, 7, "train", group_id="3")


def adapter(count: int, seed: int = 0) -> ArrayRecord:
    rng = np.random.default_rng(seed)
    return ArrayRecord({f"layer.{i}.lora_A": Array(rng.normal(size=(2, i + 1)).astype(np.float32)) for i in range(count)})


def same(a: Message, b: Message) -> bool:
    assert a.metadata is b.metadata
    return list(a.content) == list(b.content) and all(a.content[k] == b.content[k] for k in a.content)


@given(st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_packed_tensors_round_trip_in_order(first: int, second: int, small: bool) -> None:
    sent = message(RecordDict({"adapter": adapter(first), "plan": ConfigRecord({"json": "{}"}), "shift-1": adapter(second, 1)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_SMALL", 10**6 if small else -1)
        there = pack(sent)
    assert is_packed(there) == (small or max(first, second) > 2) and (WHOLE in there.content) == small
    back = unpack(there)
    assert same(back, sent) and list(back.content.array_records["adapter"]) == list(sent.content.array_records["adapter"])


def test_a_small_message_is_three_objects() -> None:
    sent = message(RecordDict({"adapter": adapter(70), "spec": ConfigRecord({"json": "{}"}), "plan": ConfigRecord({"json": "{}"})}))
    assert len(get_all_nested_objects(sent)) > 140
    assert len(get_all_nested_objects(pack(sent))) == 3  # the message, its record dict, and the one record in it


def test_a_message_without_tensors_is_not_packed() -> None:
    original = message(RecordDict({"hello": ConfigRecord({"json": "{}"})}))
    assert not is_packed(pack(original)) and same(pack(original), original)


def test_an_adapter_of_any_size_is_a_few_objects_that_messages_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_SMALL", 1000)  # bytes; a low limit, so that this adapter counts as large
    shared, known = adapter(70), {}
    a, b = (message(RecordDict({"adapter": shared, "plan": ConfigRecord({"client": c})})) for c in "ab")
    assert len(get_all_nested_objects(a)) > 140
    packed = [pack(m, known) for m in (a, b)]
    assert packed[0].content["adapter"] is packed[1].content["adapter"]
    # message, record dict's two records, the packed array, its one chunk
    assert len(get_all_nested_objects(packed[0])) <= 6
    assert len(a.content.array_records["adapter"]) == 70, "what was given stays as it is"


def test_errors_and_unpacked_messages_pass_unchanged() -> None:
    original = message(RecordDict({"adapter": adapter(2)}))
    assert same(unpack(original), original)
    failed = Message(Error(code=1, reason="no"), reply_to=original)
    assert pack(failed) is failed and unpack(failed) is failed and not is_packed(failed)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x05ab"])
def test_a_damaged_packed_record_gives_a_one_sentence_error(data: bytes) -> None:
    bad = ArrayRecord({NAME: Array(dtype="uint8", shape=(len(data),), stype=KIND, data=data)})
    with pytest.raises(ValueError, match="a packed record cannot be read"):
        unpack(message(RecordDict({"adapter": bad})))


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord({NAME: b"\xff\xff"}),
        ConfigRecord({NAME: b"\x0a\x03\x0a\x01a"}),
        ConfigRecord({NAME: "text"}),
        ConfigRecord({}),
        adapter(1),
    ],
    ids=["no protobuf", "no record in it", "text", "nothing", "arrays"],
)
def test_a_damaged_packed_message_gives_a_one_sentence_error(record: ConfigRecord | ArrayRecord) -> None:
    with pytest.raises(ValueError, match="a packed message cannot be read"):
        unpack(message(RecordDict({WHOLE: record})))

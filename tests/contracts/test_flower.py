"""Smoke test of the Flower internals that fedtune uses: it fails first when a new Flower changes them."""

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid

from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState


def content() -> RecordDict:
    return RecordDict({"a": ArrayRecord({"w": Array(torch.ones(3, 2))}), "c": ConfigRecord({"json": "{}"}), "m": MetricRecord({"x": 1.5})})


def test_metered_bytes_equal_the_serialized_message() -> None:
    meter, shared = flower.Meter(), content()
    assert meter(shared) == meter(shared) == len(recorddict_to_proto(content()).SerializeToString())


def test_messages_need_an_identity_and_get_an_id() -> None:
    flower.identify_process(run_id=7)
    message = Message(content(), 3, "train")
    assert message.metadata.run_id == 7 and message.metadata.message_id == ""
    assert flower.stamp(message) == message.metadata.message_id != ""


def test_a_copy_can_be_emptied_without_harm() -> None:
    flower.identify_process(run_id=1)
    message = Message(content(), 3, "train")
    copy = flower.copy_message(message)
    copy.content.array_records["a"].pop("w")
    copy.content.config_records["c"]["json"] = "changed"
    copy.content.pop("m")
    assert set(message.content) == {"a", "c", "m"} and "w" in message.content.array_records["a"]
    assert message.content.config_records["c"]["json"] == "{}"
    assert copy.metadata.message_id == message.metadata.message_id


def test_our_arrays_equal_flowers() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    ours = AdapterState({"w": tensor, "s": torch.tensor(2.0)}, AdapterSpec(method="lora")).to_arrays()
    for name, expected in (("w", Array(tensor)), ("s", Array(torch.tensor(2.0)))):
        assert (ours[name].dtype, ours[name].shape, ours[name].stype, ours[name].data) == (
            expected.dtype,
            expected.shape,
            expected.stype,
            expected.data,
        )
    back = recorddict_from_proto(recorddict_to_proto(RecordDict({"a": ours})))
    assert torch.equal(AdapterState.from_arrays(back.array_records["a"], AdapterSpec(method="lora"))["w"], tensor)


def test_the_flower_internals_of_the_network_exist() -> None:
    """Both modules import names that are not part of Flower's stable API; tests/network tests their use."""
    from fedtune.network import _flwr, _flwr_client

    assert all(hasattr(_flwr, name) for name in _flwr.__all__)
    assert issubclass(_flwr.HttpGrid, Grid)
    assert {"PullMessages", "PushMessages", "ActivateNode", "SendNodeHeartbeat"} <= set(dir(_flwr_client.FleetHttpClient))

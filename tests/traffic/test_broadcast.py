"""Broadcasts: each tensor or its difference from the first adapter, whichever is smaller, and the client's checks."""

import json

import pytest
import torch

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import PlanError, UpdateMismatch
from fedtune.traffic import Codec, decode_broadcast, encode_broadcast

FIRST = {"near": torch.linspace(-1, 1, 97), "far": torch.ones(3, 5), "ranked": torch.ones(4, 3)}


def adapter() -> AdapterState:
    gen = torch.Generator().manual_seed(0)
    near = FIRST["near"] + 0.001 * torch.randn(97, generator=gen)
    tensors = {"near": near, "far": -FIRST["far"], "ranked": torch.ones(2, 3), "mask": torch.tensor([5, 9], dtype=torch.int32)}
    return AdapterState(tensors, AdapterSpec(method="lora", version=3))


def test_near_the_first_adapter_only_the_difference_is_rounded() -> None:
    sent, header = encode_broadcast(Codec(values="int8"), adapter(), FIRST, 0)
    assert [(n, d) for n, _, _, d in json.loads(header)["tensors"]] == [("near", True), ("far", False), ("ranked", False), ("mask", False)]
    decoded = decode_broadcast(header, sent, FIRST)
    assert list(decoded.tensors) == list(adapter().tensors) and decoded.spec == adapter().spec
    # absmax of the difference is about 0.003, of the tensor 1: the step is 0.003 / 127 and not 1 / 127
    assert (decoded["near"] - adapter()["near"]).abs().max() < 0.003 / 127
    assert torch.allclose(decoded["far"], adapter()["far"]) and torch.equal(decoded["mask"], adapter()["mask"])


def test_rounding_does_not_add_up_over_rounds() -> None:
    codec, state = Codec(values="nf4"), adapter()
    sent, header = encode_broadcast(codec, state, FIRST, 0)
    again, _ = encode_broadcast(codec, state, FIRST, 0)
    assert all(torch.equal(sent[n], again[n]) for n in sent.tensors)  # it depends only on the state, not on earlier messages
    assert (decode_broadcast(header, sent, FIRST)["near"] - state["near"]).abs().max() < 0.152 * 0.004


@pytest.mark.parametrize("text", ["[]", "{", '{"codec": "int8", "tensors": [["a", "nothing", [2], false]]}', '{"codec": 3, "tensors": []}',
                                  '{"codec": "int8", "tensors": [["a", "float32", [-2], false]]}'])  # fmt: skip
def test_an_unreadable_broadcast_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="^the server's broadcast cannot be read"):
        decode_broadcast(text, adapter(), FIRST)


def test_a_broadcast_that_does_not_match_its_description_is_refused() -> None:
    sent, header = encode_broadcast(Codec(values="int8"), adapter(), FIRST, 0)
    with pytest.raises(UpdateMismatch, match="array '#q' of the encoded tensors is"):
        decode_broadcast(header.replace("97", "98"), sent, FIRST)
    with pytest.raises(
        PlanError,
        match="^the server sent 'near' as a difference from the run's first adapter, .* does not have it",
    ):
        decode_broadcast(header, sent, {})

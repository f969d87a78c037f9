"""Updates: sent part and residual add up to the training difference, which the server adds to its own tensors."""

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.errors import UpdateMismatch
from fedtune.traffic import Codec, decode_update, encode_update

CODECS = ("topk=0.05+fp32", "topk=0.1+int8", "topk=0.2+nf4", "int8", "nf4", "bf16", "fp16", "topk=0.1+int8+stochastic")


def state(seed: int, scale: float = 1.0) -> AdapterState:
    gen = torch.Generator().manual_seed(seed)
    shapes = {"q.lora_A": (2, 53), "q.lora_B": (31, 2), "norm.bias": (), "head.weight": (3, 7)}
    return AdapterState({n: torch.randn(s, generator=gen) * scale for n, s in shapes.items()}, AdapterSpec(method="lora"))


def lost_share(
    codec: Codec, base: AdapterState, trained: AdapterState, residual: dict[str, Tensor], seed: int, client: Codec | None = None
) -> float:
    """Largest |sent + e_new − (Δ + e_old)|, as a share of the largest |Δ + e_old|."""
    sent, left = encode_update(client or codec, trained, base.tensors, residual, seed)
    arrived = codec.decode(sent.tensors, trained.tensors)
    worst = 0.0
    for name, t in trained.tensors.items():
        u = t - base[name] + residual[name]
        worst = max(worst, float(((arrived[name] + left[name]) - u).abs().max() / u.abs().max()))
    return worst


@pytest.mark.parametrize("name", CODECS)
@given(seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_sent_and_residual_add_up_to_update_and_old_residual(name: str, seed: int) -> None:
    codec = dataclasses.replace(Codec.from_name(name), feedback=True)
    mass = lost_share(codec, state(seed), state(seed + 1), dict(state(seed + 2, 0.1).tensors), seed)
    # top-k sends an entry or keeps it: nothing is rounded; otherwise u − sent is one float32 subtraction
    assert mass == 0.0 if codec.values == "fp32" else mass <= 1e-7


def test_the_tests_detect_a_lost_residual() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Optimist(Codec):
        """Assumes that the update was sent without error."""

        def decode(self, arrays: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: t * 1.01 for n, t in super().decode(arrays, like).items()}

    right, wrong = Codec(share=0.05, feedback=True), Optimist(share=0.05, feedback=True)
    start, trained, residual = state(0), state(1), dict(state(2, 0.1).tensors)
    assert lost_share(right, start, trained, residual, 0) == 0.0
    assert lost_share(right, start, trained, residual, 0, client=wrong) > 1e-3


def test_the_residual_arrives_in_later_updates() -> None:
    # one tensor, one entry a round. Δ = (3, 2, 1) each round; e: (0, 2, 1), then u = (3, 4, 2) sends 4 and leaves (3, 0, 2), then (6, 2, 3)
    codec = Codec(share=1 / 3, feedback=True)
    spec, zero = AdapterSpec(method="lora"), {"w": torch.zeros(3)}
    trained, residual, arrived = AdapterState({"w": torch.tensor([3.0, 2.0, 1.0])}, spec), {}, []
    for _ in range(3):
        sent, residual = encode_update(codec, trained, zero, residual, 0)
        arrived.append(codec.decode(sent.tensors, zero)["w"].tolist())
    assert arrived == [[3, 0, 0], [0, 4, 0], [6, 0, 0]] and residual["w"].tolist() == [0, 2, 3]  # sums: 9, 6, 3


def test_residuals_of_unsent_tensors_are_kept_and_of_other_shapes_ignored() -> None:
    codec, spec = Codec(share=0.5, feedback=True), AdapterSpec(method="lora")
    residual = {"a": torch.ones(2), "b": torch.ones(4)}
    sent, left = encode_update(codec, AdapterState({"b": torch.tensor([1.0, 2.0])}, spec), {"b": torch.zeros(4)}, residual, 0)
    assert sent["#q"].tolist() == [2.0] and left["a"].tolist() == [1, 1] and left["b"].tolist() == [1, 0]
    plain, none = encode_update(Codec(share=0.5), AdapterState({"b": torch.tensor([1.0, 2.0])}, spec), {"b": torch.zeros(2)}, {}, 0)
    assert none == {} and plain["#q"].tolist() == [2.0]


def test_the_server_adds_the_difference_to_its_own_tensors() -> None:
    codec, server, client = Codec(values="int8"), state(0), state(0).replace({n: t + 0.5 for n, t in state(0).tensors.items()})
    trained = client.replace({n: t + 1.0 for n, t in client.tensors.items()})
    sent, _ = encode_update(codec, trained, client.tensors, {}, 0)
    decoded = decode_update(codec, sent, server)
    assert list(decoded.tensors) == list(server.tensors)
    # the client's start, which was off by 0.5, has no effect
    assert all(torch.allclose(decoded[n], server[n] + 1.0, atol=1e-5) for n in decoded.tensors)


def test_dtypes_are_the_servers_and_integers_are_unchanged() -> None:
    spec = AdapterSpec(method="sparse")
    base = AdapterState({"i": torch.tensor([1, 70_000], dtype=torch.int32), "v": torch.zeros(2, dtype=torch.bfloat16)}, spec)
    trained = base.replace({"i": base["i"], "v": torch.tensor([1.0, -1.0], dtype=torch.bfloat16)})
    sent, _ = encode_update(Codec(values="nf4"), trained, base.tensors, {}, 0)
    decoded = decode_update(Codec(values="nf4"), sent, base)
    assert decoded["v"].dtype == torch.bfloat16 and decoded["v"].tolist() == [1.0, -1.0] and decoded["i"].tolist() == [1, 70_000]


def test_a_sum_that_is_not_finite_is_refused() -> None:
    base = AdapterState({"w": torch.tensor([3e38, 0.0])}, AdapterSpec(method="lora"))  # one of two entries overflows
    with pytest.raises(UpdateMismatch, match="^tensor 'w' has values that are not finite"):
        decode_update(Codec(), base.replace({"#q": torch.full((2,), 3e38)}), base)

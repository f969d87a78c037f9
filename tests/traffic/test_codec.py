"""Codecs: error bounds, byte counts, unbiased rounding, and checks of received payloads."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.errors import PlanError, UpdateMismatch
from fedtune.traffic import Codec, values
from fedtune.traffic.values import NF4, VALUES

NAMES = ("fp32", "fp16", "bf16", "int8", "nf4", "topk=0.05+fp32", "topk=0.3+int8", "topk=0.01+nf4+stochastic", "topk=0.5+bf16+feedback",
         "topk=0.5+fp16+stochastic")  # fmt: skip
SHAPES = st.lists(st.lists(st.integers(0, 13), max_size=3).map(tuple), max_size=4)


def random_tensors(shapes: Iterable[tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(shape, generator=gen) * 10.0**-i for i, shape in enumerate(shapes)}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([torch.empty(0), *(t.flatten() for t in tensors.values())])


@pytest.mark.parametrize("name", NAMES)
@given(shapes=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_shapes_are_decoded_and_have_the_announced_bytes(name: str, shapes: list[tuple[int, ...]], seed: int) -> None:
    codec, tensors = Codec.from_name(name), random_tensors(shapes, seed)
    before = {n: t.clone() for n, t in tensors.items()}
    payload = codec.encode(tensors, seed)
    assert sum(t.numel() * t.element_size() for t in payload.values()) == codec.nbytes(tensors)
    back = codec.decode(payload, tensors)
    assert [(n, t.shape) for n, t in back.items()] == [(n, t.shape) for n, t in tensors.items()]
    assert all(torch.equal(tensors[n], before[n]) for n in before)
    again = codec.encode(tensors, seed)
    assert all(torch.equal(payload[n], again[n]) for n in payload)  # draws depend only on the seed
    if name == "fp32":
        assert all(torch.equal(back[n], t) for n, t in tensors.items())


def worst_error(name: str, stochastic: bool) -> float:
    """Largest |decoded − v| as a share of the block's scale (bf16: of the number), over blocks of very different magnitude."""
    tensors = random_tensors([(3, 67), (), (129,), (0, 4), (64,)])
    codec = Codec(values=name, stochastic=stochastic)
    arrays = codec.encode(tensors)
    error = (flat(codec.decode(arrays, tensors)) - flat(tensors)).abs()
    if name == "bf16":
        return float((error / flat(tensors).abs()).max())
    lengths = [t.numel() for t in tensors.values()]
    return float((error / values._spread(arrays["#scale"], lengths)).max())


BOUNDS = {"bf16": 2**-8, "int8": 0.5, "nf4": (1 - 0.6961928009986877) / 2}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_error_is_at_most_half_a_step_or_one_if_stochastic(name: str) -> None:
    assert BOUNDS[name] * 0.8 < worst_error(name, False) <= BOUNDS[name] * 1.00001
    assert BOUNDS[name] < worst_error(name, True) <= BOUNDS[name] * 2.00001


def test_fp16_is_finer_than_bf16() -> None:
    tensors = {"v": 10.0 ** torch.linspace(-9, 4, 997) * torch.tensor([1.0, -1.0]).repeat(499)[:997]}
    for stochastic, seen, slack in ((False, 0.9, 1), (True, 1, 2)):
        codec = Codec(values="fp16", stochastic=stochastic)
        error = (codec.decode(codec.encode(tensors, 1), tensors)["v"] - tensors["v"]).abs()
        normal = tensors["v"].abs() >= 2**-14
        worst = float((error / tensors["v"].abs())[normal].max())
        assert seen * 2**-11 < worst <= slack * 2**-11 and float(error[~normal].max()) <= slack * 2**-25
    ends = torch.tensor([65504.0, -65504.0, 0.0, 2**-24, 1.0])
    assert Codec(values="fp16", stochastic=True).encode({"v": ends})["#q"].tolist() == ends.tolist()  # numbers that fp16 can represent stay


@pytest.mark.parametrize("stochastic", [False, True])
def test_values_beyond_fp16_are_refused(stochastic: bool) -> None:
    with pytest.raises(UpdateMismatch, match="is 6.55e.04, but the largest fp16 value is 65,504: use bf16 or int8"):
        Codec(values="fp16", stochastic=stochastic).encode({"v": torch.tensor([1.0, -65510.0])})


def test_the_tests_detect_a_wrong_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "round", torch.Tensor.floor)  # int8 rounds down
    assert worst_error("int8", False) > BOUNDS["int8"] * 1.5
    monkeypatch.undo()
    monkeypatch.setattr(values, "NF4", (-1.0, -0.6, *NF4[2:]))  # a level that is not in NF4
    assert worst_error("nf4", False) > BOUNDS["nf4"] * 1.1


def test_int8_and_nf4_by_hand() -> None:
    v = {"a": torch.tensor([127.0, -63.4, 0.6]), "b": torch.tensor([0.0])}
    payload = Codec(values="int8").encode(v)
    # blocks do not cross tensors: absmax 127 gives scale 1; the block of zeros has scale 0
    assert payload["#q"].tolist() == [127, -63, 1, 0] and payload["#scale"].tolist() == [1.0, 0.0]
    payload = Codec(values="nf4").encode(v)
    # -63.4 / 127 = -0.499: nearest is code 2 (-0.525); 0.6 / 127 is nearest to 0 (code 7). 15 2 | 7 7
    assert payload["#q"].tolist() == [0xF2, 0x77] and payload["#scale"].tolist() == [127.0, 0.0]


def test_the_code_book_matches_qlora() -> None:
    # its 16 levels: 0, and the means of neighboring quantiles of N(0, 1), of 9 to the right and 8 to the left, over the largest
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    right = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    left = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    book = torch.cat([right, torch.zeros(1), left]).sort().values
    assert torch.allclose(book / book.abs().max(), torch.tensor(NF4), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "per_entry"), [("fp32", 4.0), ("fp16", 2.0), ("bf16", 2.0), ("int8", 1 + 4 / 64), ("nf4", 1 / 2 + 4 / 64)]
)
def test_bytes_per_parameter(name: str, per_entry: float) -> None:
    like = {"a": torch.empty(64, 128), "b": torch.empty(128, 192)}
    assert Codec(values=name).nbytes(like) == per_entry * (64 * 128 + 128 * 192)  # int8: 1.0625, nf4: 0.5625
    n = 32_768
    k = math.ceil(0.05 * n)  # 1,639; 32,768 // 1,639 = 19: 4 low bits, 1,639·5 + 32,767 // 16 = 10,242 bits
    numbers = {"fp32": 4 * k, "fp16": 2 * k, "bf16": 2 * k, "int8": k + 4 * 26, "nf4": 820 + 4 * 26}[name]  # 25.6 blocks
    assert Codec(values=name, share=0.05).nbytes(like) == 1281 + numbers


def test_top_k_sends_the_largest_of_all_tensors_and_all_of_them_without_loss() -> None:
    v = {"a": torch.tensor([[1.0, -9.0], [0.0, 2.0]]), "mask": torch.tensor([3, 8], dtype=torch.int32), "b": torch.tensor([5.0, -2.0])}
    codec = Codec(share=0.5)  # 3 of 6; of the two 2s the first
    payload = codec.encode(v)
    assert payload["#q"].tolist() == [-9.0, 2.0, 5.0] and torch.equal(payload["mask"], v["mask"])
    back = codec.decode(payload, v)
    assert back["a"].tolist() == [[0.0, -9.0], [0.0, 2.0]] and back["b"].tolist() == [5.0, 0.0] and back["mask"].tolist() == [3, 8]
    everything = random_tensors([(7, 11), (), (13,)])
    whole = Codec(share=1.0)
    assert all(torch.equal(t, everything[n]) for n, t in whole.decode(whole.encode(everything), everything).items())
    assert "#index" not in whole.encode(everything)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16", *BOUNDS])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    numbers = torch.tensor([1.0, 0.7, -0.33, 0.0123, -0.9])  # one block, so that the scale is 1 (or 1 / 127)
    draws = 10_000
    tensors = {f"t{i}": numbers for i in range(draws)}  # each tensor has blocks of its own
    codec = Codec(values=name, stochastic=True)
    mean = flat(codec.decode(codec.encode(tensors, 3), tensors)).view(draws, -1).mean(0)
    step = {"fp16": 2**-11, "bf16": 2**-8, "int8": 1 / 127, "nf4": 0.304}[name]
    assert ((mean - numbers).abs() <= 4 * step / 2 / math.sqrt(draws) + 1e-7).all()  # σ of a draw is at most half a step
    nearest = flat(Codec(values=name).decode(Codec(values=name).encode({"v": numbers}), {"v": numbers}))
    assert ((nearest - numbers).abs() > 5 * step / 2 / math.sqrt(draws)).any()  # rounding to the nearest would not pass


@pytest.mark.parametrize("name", [*NAMES, "topk=1e-05+int8"])
def test_a_codec_is_fully_described_by_its_name(name: str) -> None:
    assert Codec.from_name(name).name == name


@pytest.mark.parametrize(
    "name", ["", "int4", "topk=2.0+int8", "topk=0.0+int8", "topk=nan+int8", "topk=0.5", "int8+topk=0.5", "int8+int8", "+", "int8+fast"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"^the plan asks for codec '.*', but this client knows .* update fedtune on the client$"):
        Codec.from_name(name)


def damage(arrays: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    return {**arrays, **{f"#{k}": v for k, v in changes.items()}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: {n: t for n, t in a.items() if n != "#scale"}, "array '#scale' of the encoded tensors is missing: the plan's codec"),
        (lambda a: damage(a, more=torch.zeros(1)), "array '#more' is not one of the codec's arrays"),
        (lambda a: damage(a, q=a["#q"][:-1]), r"array '#q' of the encoded tensors is torch.int8 \(5,\), wanted torch.int8 \(6,\)"),
        (lambda a: damage(a, q=a["#q"].float()), r"array '#q' of the encoded tensors is torch.float32 \(6,\)"),
        (lambda a: damage(a, index=a["#index"][:-1]), "array '#index' of the encoded tensors is torch.uint8"),
        (lambda a: damage(a, index=~a["#index"]), "the positions are damaged"),
        (lambda a: damage(a, scale=-a["#scale"]), "the update's scales are damaged: each must be finite and not negative"),
        (lambda a: damage(a, scale=a["#scale"] * math.nan), "the update's scales are damaged"),
        (lambda a: damage(a, scale=a["#scale"] * 0 + 3.4e38), "the update has values that are not finite"),
        (lambda a: damage(a, q=torch.full_like(a["#q"], -128)), "the update's int8 codes are damaged: valid codes are -127 to 127"),
    ],
)  # fmt: skip
def test_a_damaged_payload_is_refused_with_a_sentence(change: Any, sentence: str) -> None:
    codec, tensors = Codec(values="int8", share=0.1), random_tensors([(5, 11)])
    with pytest.raises(UpdateMismatch, match=sentence):
        codec.decode(change(codec.encode(tensors)), tensors)


@pytest.mark.parametrize(
    ("values", "array", "bad", "sentence"),
    [
        ("fp32", "#q", math.inf, "the update has values that are not finite"),
        ("int8", "#q", -128, "the update's int8 codes are damaged"),
        ("int8", "#scale", 3.4e38, "the update has values that are not finite"),
        ("int8", "#scale", math.nan, "the update's scales are damaged"),
        ("nf4", "#scale", -1.0, "the update's scales are damaged"),
    ],
)
def test_a_single_damaged_value_is_refused(values: str, array: str, bad: float, sentence: str) -> None:
    codec, tensors = Codec(values=values), random_tensors([(5, 40)])  # four blocks
    arrays = codec.encode(tensors)
    arrays[array][1] = bad
    with pytest.raises(UpdateMismatch, match=sentence):
        codec.decode(arrays, tensors)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("values", VALUES)
def test_a_block_of_zeros_is_decoded_exactly(values: str, stochastic: bool) -> None:
    codec, tensors = Codec(values=values, stochastic=stochastic and values != "fp32"), {"a": torch.cat([torch.ones(64), torch.zeros(64)])}
    assert torch.equal(codec.decode(codec.encode(tensors), tensors)["a"], tensors["a"])


def test_non_finite_values_are_refused() -> None:
    for name in VALUES:
        with pytest.raises(UpdateMismatch, match="values that are not finite"):
            Codec(values=name, share=0.5).encode({"a": torch.tensor([1.0, math.nan])})

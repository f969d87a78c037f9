"""Each kind compared with a float product of the weights of its portable tensors: torch's linears, and the native ones in use."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.engine import linear as engine_linear
from fedtune.inference.engine.bfloat16 import Array, as_float32, to_bfloat16
from fedtune.inference.engine.linear import KINDS
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.native.choice import why_torch
from fedtune.inference.engine.reference import linears
from fedtune.inference.engine.reference.linears import apply
from fedtune.inference.engine.reference.tensors import as_array, as_tensor

# bounds of ‖y - x Wᵀ‖ / ‖x Wᵀ‖ with the dequantized W: x, y and int4's w are rounded to 8 bits of mantissa, in int8 x to 255 steps
BOUND = {"fp32": 1e-6, "bf16": 0.004, "int8": 0.012, "int4": 0.005}
NATIVE_BOUND = BOUND | {"int4": 0.012}  # native int4 rounds activations and scales to 8 bits


@pytest.fixture(autouse=True)
def _torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_NATIVE", "off")


def portable(kind: str, weight: Tensor, *, group: int = 32) -> dict[str, Array]:
    return engine_linear.portable(kind, as_array(weight), group=group)


def dequantized_weight(kind: str, tensors: dict[str, Array], *, n_in: int, group: int = 32) -> Tensor:
    return torch.from_numpy(engine_linear.dequantized(kind, tensors, n_in=n_in, group=group))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_out", "n_in"), [(37, 45), (101, 48), (192, 172), (64, 256), (1, 33)])
@pytest.mark.parametrize("path", ["torch", "native"])
def test_the_product_equals_that_of_the_dequantized_weights(
    path: str, kind: str, n_out: int, n_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = (BOUND if path == "torch" else NATIVE_BOUND)[kind]
    if path == "native":
        monkeypatch.delenv("FEDTUNE_NATIVE")
        if why_torch(kind):
            pytest.skip(str(why_torch(kind)))
    torch.manual_seed(n_out)
    for group in (32, 64) if kind == "int4" else (32,):
        tensors = portable(kind, torch.randn(n_out, n_in) + 0.1, group=group)
        packed_linear, weight = (
            linear_from_tensors(kind, tensors, n_in=n_in, group=group),
            dequantized_weight(kind, tensors, n_in=n_in, group=group),
        )
        assert (packed_linear.n_in, packed_linear.n_out) == (n_in, n_out)
        for rows in (1, 3, 5, linears.DENSE, linears.DENSE + 7):
            x = torch.randn(rows, n_in) * torch.logspace(-3, 2, rows)[:, None]  # each row has its own size
            y = apply(packed_linear, x)
            assert y.dtype == torch.float32 and y.shape == (rows, n_out)
            if n_out == 1:  # a single number may cancel
                torch.testing.assert_close(y, x @ weight.T, atol=bound * float(x.norm() * weight.norm()), rtol=0)
            else:
                assert relative(y / x.norm(dim=1, keepdim=True), x @ weight.T / x.norm(dim=1, keepdim=True)) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_is_added_unrounded_and_rows_are_independent(kind: str) -> None:
    tensors, bias = portable(kind, torch.randn(50, 40)), torch.randn(50) * 1000
    plain, biased = (partial(apply, linear_from_tensors(kind, t, n_in=40)) for t in (tensors, tensors | {"bias": as_array(bias)}))
    x = torch.randn(4, 40)
    torch.testing.assert_close(biased(x), plain(x) + bias, rtol=1e-6, atol=1e-4)
    assert torch.equal(plain(torch.zeros(2, 40)), torch.zeros(2, 50))
    mixed = torch.stack([x[0], x[0] * 1e6])
    assert relative(plain(mixed)[:1], plain(x[:1])) < 1e-6


def test_groups_of_equal_weights_are_exact() -> None:
    weight = torch.tensor([0.0, 0.25, -3.0]).repeat_interleave(32)[None]
    assert torch.equal(dequantized_weight("int4", portable("int4", weight), n_in=96), weight)
    assert torch.equal(dequantized_weight("int8", portable("int8", weight * 0), n_in=96), weight * 0)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):  # below, at and above the middle, with every sign and exponent
        x = (upper | lower).view(np.float32)
        found, wanted = as_tensor(to_bfloat16(x)), torch.from_numpy(x).bfloat16()
        assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found[~found.isnan()], wanted[~wanted.isnan()])
        assert torch.equal(torch.from_numpy(as_float32(to_bfloat16(x))).nan_to_num(7), found.float().nan_to_num(7))


def test_onednn_gets_few_different_row_counts() -> None:
    # oneDNN compiles and keeps a kernel for each number: a server that meets all numbers would grow for an hour
    met = {len(linears._stepped(torch.ones(rows, 2))) for rows in range(1, 513)}
    assert met == {*range(1, 9), *range(16, 129, 16), *range(192, 513, 64)}
    x = torch.randn(11, 3)
    assert torch.equal(linears._stepped(x)[:11], x) and not linears._stepped(x)[11:].any()


def test_int8_by_hand() -> None:
    tensors = portable("int8", torch.tensor([[1.27, -0.64, 0.0], [0.0, 0.0, 0.0]]))
    # the largest, 1.27, is 127 steps of 0.01; a row of zeros has steps of 1
    assert tensors["packed"].tolist() == [[127, -64, 0], [0, 0, 0]]
    torch.testing.assert_close(as_tensor(tensors["scale"]), torch.tensor([0.01, 1.0]))
    y = apply(linear_from_tensors("int8", tensors, n_in=3), torch.tensor([[127.0, -127.0, 5.0]]))
    torch.testing.assert_close(y, torch.tensor([[127 * 1.27 + 127 * 0.64, 0.0]]))  # x is whole steps of 1: exact


def test_int4_by_hand() -> None:
    weight = torch.arange(16.0).repeat(2)[None] / 4 - 1  # -1, -0.75 .. 2.75: sixteen steps of 1/4, all of them bfloat16 numbers
    tensors = portable("int4", weight)
    # w = (q - 8) / 4 + zero and q = 0 is -1: zero = 1; the even column lies in the low half: 0 | 1 << 4, 2 | 3 << 4 ..
    assert as_float32(tensors["scale"]).tolist() == [[0.25]] and as_float32(tensors["zero"]).tolist() == [[1.0]]
    assert tensors["packed"][0, :3].tolist() == [0x10, 0x32, 0x54]
    assert torch.equal(dequantized_weight("int4", tensors, n_in=32), weight)
    x = torch.zeros(2, 32)
    x[0, 1], x[1, 15] = 1, 2
    assert apply(linear_from_tensors("int4", tensors, n_in=32), x).tolist() == [[-0.75], [5.5]]


@given(st.integers(1, 70), st.integers(1, 140), st.sampled_from([32, 64]), st.floats(-3, 3))
def test_rounding_to_the_nearest_is_within_half_a_step(n_out: int, n_in: int, group: int, shift: float) -> None:
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(n_out * 1000 + n_in)) + shift
    int8 = portable("int8", weight)
    assert bool(((dequantized_weight("int8", int8, n_in=n_in) - weight).abs() <= as_tensor(int8["scale"])[:, None] * 0.5001).all())
    int4 = portable("int4", weight, group=group)
    step, zero = (as_tensor(int4[part]).float().repeat_interleave(group, 1)[:, :n_in] for part in ("scale", "zero"))
    # scale and zero are themselves rounded to 8 bits, which may push the ends out by 15/2 · 2⁻⁸ steps and |zero| · 2⁻⁹
    slack = step * (0.5 + 15 / 512) + zero.abs() / 256 + 1e-6
    assert bool(((dequantized_weight("int4", int4, n_in=n_in, group=group) - weight).abs() <= slack).all())


def test_many_and_few_rows_use_two_kernels_with_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(150, 80)
    whole = portable("int4", weight)
    for module in (engine_linear, linears):
        monkeypatch.setattr(module, "_CHUNK", 64 * 96)  # several chunks, the last not full
    tensors = portable("int4", weight)
    assert all((tensors[part] == whole[part]).all() for part in whole)
    packed_linear = partial(apply, linear_from_tensors("int4", tensors, n_in=80))
    x = torch.randn(linears.DENSE + 1, 80)
    dense = packed_linear(x)
    assert relative(dense, torch.cat([packed_linear(x[:35]), packed_linear(x[35:])])) < 0.005
    monkeypatch.setattr(linears, "_known_layout", lambda: False)  # with an unknown packing, one kernel takes any number of rows
    assert not torch.equal(packed_linear(x), dense) and relative(packed_linear(x), dense) < 0.005


def test_a_machine_without_vnni_takes_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, x = portable("int8", torch.randn(30, 64)), torch.randn(3, 64)
    want = x @ dequantized_weight("int8", tensors, n_in=64).T
    monkeypatch.setattr(linears, "_has_vnni", lambda: False)
    packed_linear = linear_from_tensors("int8", tensors, n_in=64)
    assert isinstance(packed_linear, linears.Int8)
    assert 0.002 < relative(apply(packed_linear, x), want) < 0.024
    assert 2 * packed_linear._steps + 1.5 < 128  # two products of 127 · 127 fit 16 bits


def test_a_machine_without_packed_bf16_uses_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, x = portable("bf16", torch.randn(30, 20)), torch.randn(3, 20)
    monkeypatch.setattr(linears, "_packs_bf16", lambda: False)
    assert relative(apply(linear_from_tensors("bf16", tensors, n_in=20), x), x @ as_tensor(tensors["weight"]).float().T) < BOUND["bf16"]


@pytest.mark.parametrize("change", ["swapped halves", "no zero", "other offset"])
def test_the_bounds_detect_a_wrong_formula(change: str) -> None:
    tensors = portable("int4", torch.randn(64, 64) + 0.5)
    weight = dequantized_weight("int4", tensors, n_in=64)
    wrong = dict(tensors)
    if change == "swapped halves":
        wrong["packed"] = tensors["packed"] << 4 | tensors["packed"] >> 4
    elif change == "no zero":
        wrong["zero"] = tensors["zero"] * 0
    else:
        wrong["zero"] = as_array(as_tensor(tensors["zero"]) + as_tensor(tensors["scale"]) / 2)
    x = torch.randn(4, 64)
    assert relative(apply(linear_from_tensors("int4", wrong, n_in=64), x), x @ weight.T) > 5 * BOUND["int4"]


def test_nbytes_are_those_of_the_packed_form() -> None:
    weight = torch.randn(128, 256)
    sizes = {kind: linear_from_tensors(kind, portable(kind, weight), n_in=256).nbytes for kind in KINDS}
    # int4: half a byte a weight, and 4 bytes for each 32 of them; int8: a scale a row, and the kernel's own sum of it
    assert sizes == {"fp32": 131072, "bf16": 65536, "int8": 32768 + 512 + 512, "int4": 16384 + 4096}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("int5", {}, "int5"),
        ("int4", {"zero": None}, "lacks its zero"),
        ("int4", {"packed": np.zeros((3, 5), np.uint8)}, r"packed of shape \(3, 5\)"),
        ("int8", {"scale": np.ones((3, 2), np.float32)}, r"scale of shape \(3, 2\)"),
        ("fp32", {"bias": np.ones(4, np.float32)}, "bias of shape"),
    ],
)
def test_invalid_tensors_of_a_linear_are_named(kind: str, changes: dict[str, Array | None], message: str) -> None:
    tensors = portable(kind if kind in KINDS else "fp32", torch.randn(3, 64))
    tensors = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
    with pytest.raises(ModelError, match=message) as caught:
        linear_from_tensors(kind, tensors, n_in=64, name="layer 7's gate")
    assert "layer 7's gate" in str(caught.value)


def test_group_sizes_unsupported_by_the_kernel_are_refused() -> None:
    with pytest.raises(ModelError, match="48"):
        portable("int4", torch.randn(3, 96), group=48)
    with pytest.raises(ModelError, match="groups of 16"):
        linear_from_tensors("int4", portable("int4", torch.randn(3, 64)), n_in=64, group=16)

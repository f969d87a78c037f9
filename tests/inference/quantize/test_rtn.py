"""Grids, codes and packing by hand, and the portable form through torch's own int4 kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.quantize.rtn import (
    Kind,
    QuantizedLinear,
    dequantize,
    fit_grid,
    pack_int4,
    packed,
    quantize_rtn,
    relative_error,
    unpack_int4,
)

SHAPES = [(3, 64), (5, 172), (2, 33), (4, 12), (1, 1)]  # rows, columns: whole groups, a short last one, fewer than a group
FORMS = [("int4", 32), ("int4", 64), ("int8", 0)]


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantize_weight(weight: Tensor, kind: str, group: int) -> QuantizedLinear:
    return packed(*quantize_rtn(weight, kind, group), weight)  # pyright: ignore[reportArgumentType]


def test_int4_by_hand() -> None:
    # least -1, greatest 2.75: a step of 3.75 / 15 = 1/4; the 16 points are -1, -3/4 .. 2.75, and zero, where q = 8, is -1 + 8/4 = 1
    weight = torch.tensor([[-1.0, 2.75, 0.3, 1.0]])
    out = quantize_weight(weight, "int4", 32)
    assert out.tensors["scale"].tolist() == [[0.25]] and out.tensors["zero"].tolist() == [[1.0]]
    assert unpack_int4(out.tensors["packed"], 4).tolist() == [[0, 15, 5, 8]]
    assert dequantize(out).tolist() == [[-1.0, 2.75, 0.25, 1.0]]
    # the only error is 0.05, over ‖w‖² = 1 + 7.5625 + 0.09 + 1
    assert out.error == pytest.approx(0.05 / 9.6525**0.5, rel=1e-5)


def test_int8_by_hand() -> None:
    weight = torch.tensor([[-12.7, 5.04, 0.06], [0.0, 0.0, 0.0]])
    out = quantize_weight(weight, "int8", 0)
    assert out.tensors["packed"].tolist() == [[-127, 50, 1], [0, 0, 0]]  # 50.4 and 0.6 steps of a tenth
    assert torch.allclose(out.tensors["scale"], torch.tensor([0.1, 1.0]))
    assert out.group == 0 and quantize_weight(weight, "int4", 64).group == 64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_no_error_exceeds_half_a_step(shape: tuple[int, int], kind: str, group: int) -> None:
    weight = random(*shape)
    grid, codes = quantize_rtn(weight, kind, group)  # pyright: ignore[reportArgumentType]
    at = torch.arange(shape[1]) // (group or shape[1])
    # int4: beyond half a step an end of the range may be off by the bfloat16 rounding of scale and zero, 2**-9 of each
    slack = 2.0**-9 * (8 * grid.scale + grid.zero.abs()) if kind == "int4" else 1e-6 * grid.scale
    assert ((grid.values(codes) - weight).abs() <= (grid.scale / 2 + slack)[:, at]).all()
    out = packed(grid, codes, weight)
    assert torch.equal(dequantize(out), grid.values(codes))
    assert out.error == pytest.approx(relative_error(dequantize(out), weight))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_nibbles_round_trip(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    nibbles = pack_int4(codes)
    assert nibbles.dtype == torch.uint8 and nibbles.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_int4(nibbles, columns), codes)


def test_the_even_column_is_in_the_low_nibble() -> None:
    assert pack_int4(torch.tensor([[1, 2, 15]])).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("group", [32, 64])
def test_the_kernel_reads_the_same_weight(group: int) -> None:
    weight, inputs = random(48, 192), random(5, 192, seed=1)
    out = quantize_weight(weight, "int4", group)
    codes = unpack_int4(out.tensors["packed"], 192).int()
    grids = torch.stack([out.tensors["scale"].T, out.tensors["zero"].T], 2).contiguous()
    actual = torch.ops.aten._weight_int4pack_mm_for_cpu(
        inputs.bfloat16(), torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), group, grids
    )
    wanted = inputs.bfloat16().float() @ dequantize(out).T
    assert relative_error(actual, wanted) < 2.0**-8  # bfloat16 sums
    # a zero of the wrong sign would be far off
    assert relative_error(inputs @ (dequantize(out) + out.tensors["scale"].float()[:, :1]).T, wanted) > 0.05


def test_a_constant_group_is_exact() -> None:
    weight = torch.tensor([[0.5] * 70, [0.0] * 70])
    for kind, group in FORMS:
        assert torch.allclose(dequantize(quantize_weight(weight, kind, group)), weight, atol=1e-7), (kind, group)


def test_finer_grids_lose_less() -> None:
    weight = random(16, 256)
    errors = [quantize_weight(weight, *form).error for form in (("int8", 0), ("int4", 32), ("int4", 128))]
    assert errors == sorted(errors)


def test_the_weight_is_unchanged() -> None:
    weight = random(4, 40)
    before = weight.clone()
    for form in FORMS:
        quantize_weight(weight, *form)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("kind", "group", "message"), [("int4", 16, "32, 64, 128, 256"), ("int4", 0, "not 0"), ("int8", 32, "one scale per row")]
)
def test_group_sizes_unsupported_by_any_kernel_are_refused(kind: str, group: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fit_grid(random(2, 64), kind, group)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    weight = random(2, 64)
    weight[1, 3] = bad
    with pytest.raises(ModelError, match="not finite"):
        fit_grid(weight, "int8", 0)


@pytest.mark.parametrize(("kind", "least", "most"), [("int4", -8, 7), ("int8", -127, 127)])
def test_a_weight_beyond_the_grid_is_clamped(kind: Kind, least: int, most: int) -> None:
    weight = torch.tensor([[-1.0, 1.0, 0.5, -0.25]])
    codes = fit_grid(weight, kind, 32 if kind == "int4" else 0).codes(100 * weight)  # GPTQ's corrected weights may lie beyond the grid
    assert (codes.min(), codes.max()) == (least, most)

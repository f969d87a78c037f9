"""GPTQ against round-to-nearest, and by hand on two columns."""

import pytest
import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.inference.quantize.awq import output_loss
from fedtune.inference.quantize.gptq import inverse_factor, quantize_gptq
from fedtune.inference.quantize.rtn import Grid, Kind, quantize_rtn

FORMS: list[tuple[Kind, int]] = [("int4", 32), ("int4", 64), ("int8", 0)]


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, like those of activations."""
    draws = torch.Generator().manual_seed(seed)
    weight, mixing = torch.randn(rows, columns, generator=draws), torch.randn(columns, columns, generator=draws)
    inputs = torch.randn(400, columns, generator=draws) @ (mixing * torch.rand(columns, generator=draws))
    return weight, inputs.T @ inputs / len(inputs)


def loss(made: tuple[Grid, Tensor], weight: Tensor, hessian: Tensor) -> float:
    return output_loss(made[0].values(made[1]) - weight, hessian)


@pytest.mark.parametrize(("kind", "group"), FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(40, 172), (7, 96), (24, 77)])
def test_the_outputs_are_closer_than_with_rounding(kind: Kind, group: int, rows: int, columns: int) -> None:
    weight, hessian = layer(rows, columns)
    ratio = loss(quantize_gptq(weight, hessian, kind, group), weight, hessian) / loss(quantize_rtn(weight, kind, group), weight, hessian)
    assert ratio < 0.75  # .44 to .61 here


@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_uncorrelated_channels_give_round_to_nearest(kind: Kind, group: int) -> None:
    weight, _ = layer(5, 77)
    for diagonal in (torch.ones(77), torch.arange(77.0), torch.zeros(77)):
        (grid, codes), (plain, nearest) = quantize_gptq(weight, torch.diag(diagonal), kind, group), quantize_rtn(weight, kind, group)
        assert torch.equal(codes, nearest)
        assert torch.equal(grid.scale, plain.scale) and torch.equal(grid.zero, plain.zero)


def test_two_columns_by_hand() -> None:
    # H = [[1, c], [c, 1]]: the best second weight, given that the first moved by d, moves by -c d
    weight, c = torch.tensor([[12.7, 0.34, 0.0]]), 0.8  # the first column fixes the grid: steps of a tenth
    hessian = torch.tensor([[1.0, 0, 0], [0, 1.0, c], [0, c, 1.0]])
    weight[0, 2] = 0.03
    _, codes = quantize_gptq(weight, hessian, "int8", 0, damp=1e-6)
    # 0.34 → 0.3, so the last should be 0.03 + 0.8 * 0.04 = 0.062 → 0.1; by itself 0.03 → 0
    assert codes.tolist() == [[127, 3, 1]]
    assert quantize_rtn(weight, "int8", 0)[1].tolist() == [[127, 3, 0]]


def test_the_block_size_does_not_change_the_result() -> None:
    weight, hessian = layer(6, 172)
    for kind, group in FORMS:
        whole, by_parts = (quantize_gptq(weight, hessian, kind, group, block=b) for b in (1024, 32))
        assert (whole[1] != by_parts[1]).float().mean() < 0.01  # sums in another order may tip a tie
        assert loss(by_parts, weight, hessian) == pytest.approx(loss(whole, weight, hessian), rel=0.02)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = layer(1, 24)
    upper = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(24, dtype=torch.float64), atol=1e-3)


def test_inputs_of_few_tokens_still_work() -> None:
    inputs = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))  # rank 3 of 96
    weight, _ = layer(5, 96)
    hessian = inputs.T @ inputs / 3
    assert loss(quantize_gptq(weight, hessian, "int4"), weight, hessian) < loss(quantize_rtn(weight, "int4"), weight, hessian)


def test_inputs_are_unchanged() -> None:
    weight, hessian = layer(4, 40)
    before = weight.clone(), hessian.clone()
    quantize_gptq(weight, hessian, "int4")
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_a_hessian_that_does_not_fit_is_refused() -> None:
    weight, hessian = layer(4, 40)
    with pytest.raises(ModelError, match="40 columns"):
        quantize_gptq(weight, hessian[:3], "int4")
    with pytest.raises(ModelError, match="not finite"):
        quantize_gptq(weight, hessian * float("nan"), "int4")
    with pytest.raises(ModelError, match="cannot be inverted"):
        quantize_gptq(weight, torch.full((40, 40), 10.0).fill_diagonal_(1), "int4")  # no product of a matrix with itself

"""SmoothQuant through the engine's own 8-bit product."""

import torch
from torch import Tensor

from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.reference.linears import apply
from fedtune.inference.engine.reference.tensors import arrays
from fedtune.inference.quantize.rtn import packed, quantize_rtn, relative_error
from fedtune.inference.quantize.smoothquant import smooth_scale


def a8w8(inputs: Tensor, weight: Tensor) -> Tensor:
    made = packed(*quantize_rtn(weight, "int8", 0), weight)
    return apply(linear_from_tensors("int8", arrays(made.tensors), n_in=weight.shape[1]), inputs)


def layer(outliers: float) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(2)
    inputs = torch.randn(64, 172, generator=draws)
    inputs[:, 5::40] *= outliers
    return inputs, torch.randn(48, 172, generator=draws)


def test_outliers_in_the_activations_cost_less() -> None:
    inputs, weight = layer(outliers=60.0)
    inputs[:, 5::40] /= 10 * torch.rand(5, generator=torch.Generator().manual_seed(0)) + 1
    weight[:, 5::40] /= 20  # so that the outliers do not dominate the output
    wanted = inputs @ weight.T
    scale = smooth_scale([weight], inputs.abs().amax(0))
    plain, smooth = (relative_error(a8w8(inputs / s, weight * s), wanted) for s in (torch.ones(172), scale))
    assert smooth < plain / 3
    # the inverse scale makes it worse
    assert relative_error(a8w8(inputs * scale, weight / scale), wanted) > plain


def test_without_outliers_the_error_does_not_grow() -> None:
    inputs, weight = layer(outliers=1.0)
    wanted, scale = inputs @ weight.T, smooth_scale([weight], inputs.abs().amax(0))
    assert relative_error(a8w8(inputs / scale, weight * scale), wanted) < 1.1 * relative_error(a8w8(inputs, weight), wanted)


def test_scales_by_hand() -> None:
    # greatest of x: 4, 1, 9; of w over both linears: 1, 4, 1 → sqrt(4 / 1), sqrt(1 / 4), sqrt(9 / 1); then / sqrt(3 * .5)
    weights = [torch.tensor([[1.0, -4.0, 0.5]]), torch.tensor([[0.25, 1.0, -1.0], [0.5, 0.0, 0.0]])]
    out = smooth_scale(weights, torch.tensor([4.0, 1.0, 9.0]))
    assert torch.allclose(out, torch.tensor([2.0, 0.5, 3.0]) / 1.5**0.5)
    # alpha = 1 makes all activations equally large
    assert torch.allclose(smooth_scale(weights, torch.tensor([4.0, 1.0, 9.0]), alpha=1.0), torch.tensor([4.0, 1.0, 9.0]) / 3)


def test_channels_without_weight_or_input_are_unchanged() -> None:
    out = smooth_scale([torch.tensor([[0.0, 1.0, 1.0]])], torch.tensor([3.0, 0.0, 1.0]))
    assert out.tolist() == [1.0, 1.0, 1.0]

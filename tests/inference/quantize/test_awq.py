"""AWQ's search against plain rounding, and its measure by hand."""

import pytest
import torch
from torch import Tensor

from fedtune.inference.quantize.awq import awq_scale, output_loss
from fedtune.inference.quantize.rtn import Kind, quantize_rtn


def layer(columns: int = 80, outliers: float = 30.0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs with a few outlier channels, as in language models."""
    draws = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, columns, generator=draws)
    inputs[:, ::17] *= outliers
    return torch.randn(24, columns, generator=draws), inputs


def loss(weight: Tensor, scale: Tensor, hessian: Tensor, kind: Kind, group: int) -> float:
    grid, codes = quantize_rtn(weight * scale, kind, group)
    return output_loss(grid.values(codes) / scale - weight, hessian)


@pytest.mark.parametrize(("kind", "group", "bound"), [("int4", 32, 0.5), ("int4", 64, 0.5), ("int8", 0, 0.5)])
def test_outlier_channels_are_rounded_more_finely(kind: Kind, group: int, bound: float) -> None:
    weight, inputs = layer()
    hessian = inputs.T @ inputs / len(inputs)
    scale = awq_scale([weight], inputs.abs().mean(0), hessian, kind, group)
    assert loss(weight, scale, hessian, kind, group) < bound * loss(weight, torch.ones(80), hessian, kind, group)
    assert scale[::17].min() > scale[1::17].max()


def test_the_grid_is_twenty_exponents_from_0_to_19_20(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def record_scale(weight: Tensor, kind: Kind, group: int) -> object:
        tried.append(float(weight[0, 1] / weight[0, 0]))
        return quantize_rtn(weight, kind, group)

    monkeypatch.setattr("fedtune.inference.quantize.awq.quantize_rtn", record_scale)
    awq_scale([torch.ones(1, 32)], torch.tensor([1.0, 4.0] * 16), torch.eye(32), "int4", 32)
    # by hand: channels of mean 1 and 4 are scaled apart by 4^a, a = 0, .05, …, .95
    assert tried == pytest.approx([4 ** (i / 20) for i in range(20)], rel=1e-5)


def test_awq_is_never_worse_than_plain_rounding() -> None:
    weight, inputs = layer(outliers=1.0)
    hessian = inputs.T @ inputs / len(inputs)
    for shared in (1, 2):
        scale = awq_scale([weight, 2 * weight[:5]], inputs.abs().mean(0), hessian, "int4", shared=shared, width=8)
        both = [sum(loss(w, s, hessian, "int4", 32) for w in (weight, 2 * weight[:5])) for s in (scale, torch.ones(80))]
        assert both[0] <= both[1]
        assert torch.equal(scale.view(-1, shared, 8)[:, 0], scale.view(-1, shared, 8)[:, -1]) or shared == 1


def test_unused_channels_do_no_harm() -> None:
    weight, inputs = layer()
    inputs[:, 3] = 0
    scale = awq_scale([weight], inputs.abs().mean(0), inputs.T @ inputs / len(inputs), "int4")
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(awq_scale([weight], torch.zeros(80), torch.zeros(80, 80), "int4"), torch.ones(80))


def test_the_loss_by_hand() -> None:
    # inputs (1, 0) and (1, 2): ΔW x = 0.5 and 0.5 + 0.2, so the mean square is (0.25 + 0.49) / 2
    inputs = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    assert output_loss(torch.tensor([[0.5, 0.1]]), inputs.T @ inputs / 2) == pytest.approx(0.37)

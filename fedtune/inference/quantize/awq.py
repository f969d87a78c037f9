"""AWQ: before rounding, enlarge the weights of the input channels that carry much, and shrink the channel itself as much.

A weight's rounding error is about a step of its group, whatever the weight's size; so the larger W_j s_j is, the smaller is its relative
error. s = mean|x|^a, and `a` is the one of 20 whose rounded linear is nearest to the real one on the calibration text.

Source: Lin et al. 2023, AWQ, arXiv:2306.00978, eq. 4 and 5. The error is each linear's own, measured
through XᵀX over the whole text; the paper's code measures that of the attention or MLP block on a sample, and goes on to clip each
group's weights, which is left out here.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedtune.inference.quantize.fold import tied, within
from fedtune.inference.quantize.rtn import GROUP, Kind, quantize_rtn

__all__ = ["awq_scale", "output_loss"]

STEPS = 20


def awq_scale(
    weights: Iterable[Tensor], mean: Tensor, hessian: Tensor, kind: Kind, group: int = GROUP, *, shared: int = 1, width: int = 1
) -> Tensor:
    """The scale [K] of the inputs that these linears [N_i, K] share.

    Args:
        weights: Asked for once, and one at a time; some rows of a linear do as well as a linear.
        mean: Mean |x| of each input channel, [K].
        hessian: XᵀX / n, [K, K].

    Other arguments:
        shared, width: Query heads that share a key-value head, and a head's width (see `fold.tied`).
    """
    size = tied(mean, shared, width).float()
    scales = [within(size ** (step / STEPS)) for step in range(STEPS)]
    losses = [0.0] * STEPS
    for weight in weights:
        for step, scale in enumerate(scales):
            grid, codes = quantize_rtn(weight * scale, kind, group)
            losses[step] += output_loss(grid.values(codes) / scale - weight, hessian)
    finite = [step for step in range(STEPS) if losses[step] < float("inf")]
    return scales[min(finite, key=lambda step: losses[step])] if finite else torch.ones_like(size)


def output_loss(change: Tensor, hessian: Tensor) -> float:
    """Mean over the inputs of ‖ΔW x‖²: tr(ΔW H ΔWᵀ) for a change ΔW [N, K]."""
    return float(((change @ hessian) * change).sum())

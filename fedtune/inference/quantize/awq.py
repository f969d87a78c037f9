"""AWQ: before rounding, scales up the weights of salient input channels, and scales the channels down by the same factor.

A weight's rounding error is about one step of its group, whatever the weight's size; so the larger W_j s_j is, the smaller is its relative
error. s = mean|x|^a, where `a` is the one of 20 values whose rounded linear has the smallest output error on the calibration text.

Source: Lin et al. 2023, AWQ, arXiv:2306.00978, eq. 4 and 5. Deviations: the error is that of each linear, computed from XᵀX over the whole
text, while the paper's code measures the attention or MLP block on a sample; and group weights are not clipped.
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
    """The scale s [K] for the input that the linears [N_i, K] share.

    Args:
        weights: Iterated once; each may be a block of a linear's rows.
        mean: Mean |x| of each input channel, [K].
        hessian: XᵀX / n, [K, K].

    Other arguments:
        shared, width: Query heads per key-value head, and channels of a head (see `fold.tied`).
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
    """Mean of ‖ΔW x‖² over the inputs: tr(ΔW H ΔWᵀ) for a change ΔW [N, K]."""
    return float(((change @ hessian) * change).sum())

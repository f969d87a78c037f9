"""SmoothQuant: shift a part of the activations' outliers to the weights, so that both fit int8.

s_j = max|x_j|^a / max|w_j|^(1 − a); x becomes x / s, W becomes W s. With a = 0.5 both have the same maximum magnitude in each channel.

Source: Xiao et al. 2022, SmoothQuant, arXiv:2211.10438, eq. 4.
"""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from fedtune.inference.quantize.fold import tied, within

__all__ = ["ALPHA", "smooth_scale"]

ALPHA = 0.5


def smooth_scale(weights: Iterable[Tensor], greatest: Tensor, *, alpha: float = ALPHA, shared: int = 1, width: int = 1) -> Tensor:
    """The scale s [K] for the input that the linears [N_i, K] share.

    Args:
        weights: Weights of the linears, or blocks of their rows; iterated once.
        greatest: Max |x| of each input channel, [K].

    Other arguments:
        alpha: The exponent a: how much of the outliers moves to the weights.
        shared, width: Query heads per key-value head, and channels of a head (see `fold.tied`).
    """
    own = reduce(torch.maximum, (w.float().abs().amax(0) for w in weights))
    return within(tied(greatest.float() ** alpha / own ** (1 - alpha), shared, width))

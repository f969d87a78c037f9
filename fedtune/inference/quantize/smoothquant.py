"""SmoothQuant: move a part of the activations' outliers into the weights, so that both fit int8.

s_j = max|x_j|^a / max|w_j|^(1 − a), then x / s and W s: with a = 0.5 both have the same greatest magnitude in each channel.

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
    """The scale [K] of the inputs that these linears [N_i, K] share.

    Args:
        weights: Asked for once, and one at a time; some rows of a linear do as well as a linear.
        greatest: Max |x| of each input channel, [K].

    Other arguments:
        alpha: How much of the difficulty moves to the weights.
        shared, width: Query heads that share a key-value head, and a head's width (see `fold.tied`).
    """
    own = reduce(torch.maximum, (w.float().abs().amax(0) for w in weights))
    return within(tied(greatest.float() ** alpha / own ** (1 - alpha), shared, width))

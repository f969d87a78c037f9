"""Quantizes a complete weight at once."""

from torch import Tensor

from fedtune.inference.quantize.layers import Stats
from fedtune.inference.quantize.model import QuantizeSettings, quantize_rows
from fedtune.inference.quantize.rtn import QuantizedLinear


def quantize_linear(weight: Tensor, recipe: QuantizeSettings, stats: Stats | None = None) -> QuantizedLinear:
    """A weight [N, K] in the portable form."""
    return quantize_rows(lambda first, last: weight[first:last], (weight.shape[0], weight.shape[1]), recipe, stats)

"""Cross-entropy over a large vocabulary, without all logits at once."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedtune.models.lean.functions import times

PIECE = 1 << 23  # logits to compute at once
_CACHED = 1 << 18  # of these, logits to normalize at once
ROWS = 64  # rows to multiply at once, at least: with fewer, reading the weight takes longer than multiplying


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None = None) -> Tensor:
    """Cross-entropy (N,) in nats, float32, of the logits hidden Wᵀ + bias; `cap` c makes them c · tanh(logits / c).

    The same pass computes the gradient of `hidden`; the weight and the bias are frozen.

    Args:
        hidden: (N, width).
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        targets: (N,) int64.
        cap: c.
    """
    return cast(Tensor, _CrossEntropy.apply(hidden, weight, bias, targets, cap))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        pieces = math.ceil(len(hidden) / max(ROWS, PIECE // len(weight)))
        rows = math.ceil(len(hidden) / max(1, pieces))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), max(1, rows)):
            logits = times(hidden[i : i + rows], weight, bias)
            wanted = targets[i : i + rows, None]
            _softmax_(logits, wanted, losses[i : i + rows], cap)
            if gradient is not None:
                gradient[i : i + rows] = times(logits, weight.T)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        if gradient is not None:  # in float32, because 1 / count rounded to bf16 would scale every gradient
            gradient = gradient.float().mul(scales[:, None]).to(gradient.dtype)
        return gradient, None, None, None, None


def _softmax_(logits: Tensor, wanted: Tensor, losses: Tensor, cap: float | None) -> None:
    """Replace logits (n, vocabulary) by the gradient of their loss, softmax(logits) − 1 at the target, and write the losses (n,).

    Computes in float32, and in so few rows at once that they stay in the processor's cache.
    """
    rows = max(1, _CACHED // logits.shape[-1])
    for some, target, loss in zip(logits.split(rows), wanted.split(rows), losses.split(rows), strict=True):
        z, slope = some.float(), None
        if cap is not None:
            z.div_(cap).tanh_()
            slope = 1 - z.square()
            z.mul_(cap)
        p = z.softmax(-1)  # faster than exp_; the largest logit minus the log of its probability is the log of the sum
        loss.copy_((z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log() - z.gather(1, target))[:, 0])
        p.scatter_add_(1, target, target.new_full(target.shape, -1, dtype=p.dtype))
        some.copy_(p if slope is None else p.mul_(slope))

"""Accepts or rejects draft tokens and draws the next one, so that the text has the distribution of plain decoding.

A draft token x ~ q is accepted with probability min(1, p(x) / q(x)). At the first rejection, the next token is drawn from the residual
norm(max(0, p - q)). If all are accepted, one more token is drawn from p.

A draft token without a distribution is certain: q(x) = 1. Then x is accepted with probability p(x), and the residual is p without x. This
is the same as drawing y ~ p, accepting x if y = x, and else using y. The code does the latter, because its text equals that of plain
decoding with the same seed, token for token, for any draft of any length.

Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1 and appendix A.1.
"""

import torch
from torch import Tensor

from fedtune.inference.engine.sample import draw


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), or p if that is zero everywhere (p = q, up to rounding): (..., V), not normalized."""
    over = (p - q).clamp(min=0)
    return torch.where(over.sum(-1, keepdim=True) > 0, over, p)


def verify(p: Tensor, drafted: Tensor, q: Tensor | None, accept: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Accept leading draft tokens and draw the next token, for B texts at once.

    Args:
        p: (B, g + 1, V): the model's distribution at each position; row i follows the first i draft tokens.
        drafted: (B, g) int64, the draft tokens.
        q: (B, g, V): the drafter's distributions; None if each draft token is certain.
        accept: (B, g) uniform numbers.
        draws: (B, g + 1) uniform numbers, float64.

    Returns:
        (B,) number of accepted draft tokens, (B,) the token after them.
    """
    guesses = drafted.shape[1]
    if q is None:
        own = draw(p.flatten(0, 1), draws.flatten()).view(draws.shape)
        kept = _first(own[:, :guesses] == drafted)
        return kept, own.gather(1, kept.unsqueeze(1)).squeeze(1)
    chosen = drafted.unsqueeze(-1)
    kept = _first(accept * q.gather(-1, chosen).squeeze(-1) < p[:, :-1].gather(-1, chosen).squeeze(-1))
    rest = torch.cat([residual(p[:, :-1], q), p[:, -1:]], dim=1)
    rows = torch.arange(len(p))
    return kept, draw(rest[rows, kept], draws[rows, kept])


def verify_greedy(best: list[int], drafted: list[int]) -> tuple[int, int]:
    """As `verify` for greedy decoding: `best` has the model's g + 1 most likely tokens, `drafted` the g draft tokens."""
    kept = next((i for i, token in enumerate(drafted) if token != best[i]), len(drafted))
    return kept, best[kept]


def _first(good: Tensor) -> Tensor:
    """Number of leading true values: (B, g) → (B,)."""
    return good.long().cumprod(1).sum(1)

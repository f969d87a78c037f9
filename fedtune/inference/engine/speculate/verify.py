"""Accepts or rejects draft tokens and draws the next one, so that the text has the distribution of plain decoding.

A draft token x ~ q is accepted with probability min(1, p(x) / q(x)). At the first rejection, the next token is drawn from the residual
norm(max(0, p - q)). If all are accepted, one more token is drawn from p.

A draft token without a distribution is certain: q(x) = 1. Then x is accepted with probability p(x), and the residual is p without x. This
is the same as drawing y ~ p, accepting x if y = x, and else using y. The code does the latter, because its text equals that of plain
decoding with the same seed, token for token, for any draft of any length.

Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1 and appendix A.1.
"""

import numpy as np

from fedtune.inference.engine.sample import draw


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(0, p - q), or p if that is zero everywhere (p = q, up to rounding): (..., V), not normalized."""
    over = np.maximum(p - q, 0)
    return np.where(over.sum(-1, keepdims=True) > 0, over, p)


def verify(
    p: np.ndarray, drafted: np.ndarray, q: np.ndarray | None, accept: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
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
    guesses, rows = drafted.shape[1], np.arange(len(p))
    if q is None:
        own = draw(p.reshape(-1, p.shape[-1]), draws.reshape(-1)).reshape(draws.shape)
        kept = _first(own[:, :guesses] == drafted)
        return kept, own[rows, kept]
    p_drafted, q_drafted = (np.take_along_axis(of, drafted[..., None], -1)[..., 0] for of in (p[:, :-1], q))
    kept = _first(accept * q_drafted < p_drafted)
    rest = p[rows, kept]
    refused = kept < guesses
    rest[refused] = residual(rest[refused], q[refused, kept[refused]])
    return kept, draw(rest, draws[rows, kept])


def verify_greedy(best: list[int], drafted: list[int]) -> tuple[int, int]:
    """As `verify` for greedy decoding: `best` has the model's g + 1 most likely tokens, `drafted` the g draft tokens."""
    kept = next((i for i, token in enumerate(drafted) if token != best[i]), len(drafted))
    return kept, best[kept]


def _first(good: np.ndarray) -> np.ndarray:
    """Number of leading true values: (B, g) → (B,)."""
    return good.cumprod(1).sum(1)

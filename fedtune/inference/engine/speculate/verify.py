"""Which guesses stay, and which token follows them, so that the text is distributed as if the model had drawn it token by token.

A guess x ~ q is kept with probability min(1, p(x) / q(x)). After the first that is not, the next token is drawn from the residual
norm(max(0, p - q)), which is what p has over q; if all are kept, one more comes from p.

A guess without a distribution is certain: q is 1 at x. Then x is kept with probability p(x), and the residual is p without x. That is the
same as to draw y ~ p and keep the guess if y = x, else to take y. It is done so, because the text is then the one that plain decoding with
the same seed would have given, token for token, whatever was guessed and how many at a time.

Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1 and appendix A.1.
"""

import torch
from torch import Tensor

from fedtune.inference.engine.sample import draw


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), or p where nothing is left of it (p and q alike, but for rounding): (..., V), not normalized."""
    over = (p - q).clamp(min=0)
    return torch.where(over.sum(-1, keepdim=True) > 0, over, p)


def verify(p: Tensor, drafted: Tensor, q: Tensor | None, accept: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the first guesses and draw the token that follows, of B texts at once.

    Args:
        p: (B, g + 1, V): what the model draws each position from; row i follows the first i guesses.
        drafted: (B, g) int64.
        q: (B, g, V): what the guesses were drawn from; None: each was certain.
        accept: (B, g) uniform numbers.
        draws: (B, g + 1) uniform numbers, float64.

    Returns:
        (B,) how many guesses stay, (B,) the token after them.
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
    """The same for the likeliest tokens: best (g + 1) of the model, drafted (g)."""
    kept = next((i for i, token in enumerate(drafted) if token != best[i]), len(drafted))
    return kept, best[kept]


def _first(good: Tensor) -> Tensor:
    """How many are true before the first that is not: (B, g) → (B,)."""
    return good.long().cumprod(1).sum(1)

"""Samples tokens from logits: temperature, top-k, top-p, min-p and repetition penalty, with the order and meaning of transformers.

Every draw depends only on (seed, position in the answer): a seed gives the same tokens, however many positions a pass decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.config.bounds import require
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import ConfigError

_COLD, _FLOOR = 1e-3, 1e-30  # the floor is close to float32's smallest number


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of an answer.

    Args:
        temperature: Logits are divided by it; 0 is greedy, which leaves top_k, top_p and min_p without effect.
        top_k: Keep the k most likely tokens (and ties); 0 keeps all.
        top_p: Keep the most likely tokens whose probabilities sum to this; 1 keeps all.
        min_p: Keep tokens with at least this fraction of the highest probability; 0 keeps all.
        repetition_penalty: Logits of tokens of the prompt and the answer are divided by it, or multiplied where negative; 1 changes none.
        seed: Seed of the draws.
        stop: The answer ends before the first of these strings.

    Raises:
        ConfigError: A number is out of range, or a stop string is empty.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require("temperature", self.temperature, ge=0, lt=math.inf)
        require("top_k", self.top_k, ge=0)
        require("top_p", self.top_p, gt=0, le=1)
        require("min_p", self.min_p, ge=0, le=1)
        require("repetition_penalty", self.repetition_penalty, ge=0.01, le=100)
        if not all(self.stop):
            raise ConfigError("a stop string is empty, which every text contains: leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def scores(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits (n, V) after all processors, in float32; -inf for excluded tokens. Greedy applies only the repetition penalty.

    Args:
        logits: (n, V).
        sampling: Sampling settings.
        seen: (n, V) bool, or (V,) for all rows: tokens of the prompt and the answer before each row; needed only for a penalty.

    Source: transformers' logits processors; Keskar et al. 2019, arXiv:1909.05858 (penalty); Holtzman et al. 2019, arXiv:1904.09751 (top-p);
    Nguyen et al. 2024, arXiv:2407.01082 (min-p).
    """
    out = logits.float()
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs the tokens seen")
        punished = torch.where(out < 0, out * sampling.repetition_penalty, out / sampling.repetition_penalty)
        out = torch.where(seen, punished, out)
    if sampling.greedy:
        return out
    if sampling.temperature < _COLD:  # else the quotient overflows, and no token would have a finite score
        out = out - out.amax(-1, keepdim=True)
    out = out / max(sampling.temperature, _FLOOR)
    if sampling.top_k and sampling.top_k < out.shape[-1]:
        out = out.masked_fill(out < out.topk(sampling.top_k).values[:, -1:], -math.inf)
    if sampling.top_p < 1:
        ascending, order = out.sort(dim=-1)
        over = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        over[:, -1] = False  # the most likely token always stays
        out = out.masked_fill(torch.zeros_like(over).scatter(-1, order, over), -math.inf)
    if sampling.min_p:
        p = out.softmax(-1)
        keep = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.argmax(-1, keepdim=True), True)
        out = out.masked_fill((p < sampling.min_p * p.amax(-1, keepdim=True)) & ~keep, -math.inf)
    return out


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution of each row, (n, V) float32; greedy puts all probability on the first maximum."""
    out = scores(logits, sampling, seen)
    if sampling.greedy:
        return torch.zeros_like(out).scatter(-1, out.argmax(-1, keepdim=True), 1.0)
    return out.softmax(-1)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """The token at quantile u of each row: (n, V) non-negative weights and (n,) float64 in [0, 1) → (n,) int64.

    A token of weight zero is never drawn; the rows need not sum to 1.
    """
    reached = p.double().cumsum(-1)
    total = reached[:, -1:].contiguous()
    found = torch.searchsorted(reached, u.unsqueeze(-1) * total, right=True)
    last = torch.searchsorted(reached, total)  # the last token of positive weight, in case u * total rounds up to the total
    return torch.minimum(found, last).squeeze(-1)


class Uniforms:
    """Uniform random numbers by position: (seed, purpose, position) → [0, 1) in float64."""

    _BLOCK = 64

    def __init__(self, seed: int, purpose: str) -> None:
        self._generator = torch.Generator().manual_seed(derive_seed(seed, purpose))
        self._drawn = torch.empty(0, dtype=torch.float64)

    def __call__(self, start: int, count: int) -> Tensor:
        """Numbers of the positions start, ..., start + count - 1: (count,) float64."""
        while len(self._drawn) < start + count:
            self._drawn = torch.cat([self._drawn, torch.rand(self._BLOCK, dtype=torch.float64, generator=self._generator)])
        return self._drawn[start : start + count]


class Sampler:
    """Draws the tokens of one answer and tracks the tokens seen.

    Args:
        sampling: Sampling settings.
        prompt: Tokens of the prompt, for the repetition penalty.
        vocabulary: V, the width of the logits.

    Attributes:
        count: Number of tokens taken: the position of the next draw.
        uniforms: The random numbers of the draws, by position.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocabulary: int) -> None:
        self.sampling = sampling
        self.count = 0
        self.uniforms = Uniforms(sampling.seed, "generate")
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[list(prompt)] = True

    def seen(self, drafted: Sequence[int] = ()) -> Tensor | None:
        """The tokens before each of the next 1 + len(drafted) rows, (1 + g, V) bool; row i follows drafted[:i]. None without a penalty."""
        if self._seen is None:
            return None
        rows = self._seen.expand(1 + len(drafted), -1).clone()
        for i, token in enumerate(drafted, 1):
            rows[i:, token] = True
        return rows

    def probabilities(self, logits: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """The distributions of the next 1 + len(drafted) tokens, where row i follows drafted[:i]: (1 + g, V)."""
        return probabilities(logits, self.sampling, self.seen(drafted))

    def scores(self, logits: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """`probabilities` before the softmax."""
        return scores(logits, self.sampling, self.seen(drafted))

    def draws(self, p: Tensor) -> list[int]:
        """Tokens for the next positions, one from each row of p (n, V)."""
        return draw(p, self.uniforms(self.count, len(p))).tolist()

    def next(self, logits: Tensor) -> int:
        """Draw the next token from logits (1, V) or (V,); call `take` to continue with it."""
        logits = logits.reshape(1, -1)
        if self.sampling.greedy:
            return int(self.scores(logits).argmax(-1))
        return self.draws(self.probabilities(logits))[0]

    def take(self, token: int) -> None:
        """Append this token to the answer."""
        self.count += 1
        if self._seen is not None:
            self._seen[token] = True

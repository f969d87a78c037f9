"""Samples tokens from logits: temperature, top-k, top-p, min-p and repetition penalty, with the order and meaning of transformers.

Every draw depends only on (seed, position in the answer): a seed gives the same tokens, however many positions a pass decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.config.bounds import require
from fedtune.contracts.seeds import derive_seed
from fedtune.errors import ConfigError, ModelError

_COLD, _FLOOR = 1e-3, 1e-30  # the temperature below which logits are shifted first; the smallest divisor
_BLOCK = 256  # weights of a row that are summed together
_NOT_FINITE = "the model's logits are not finite"


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

    @property
    def sharpness(self) -> float:
        """Factor on logits for a drafter's chances: 1 / temperature, but at most 1000; 1 if greedy."""
        return 1.0 if self.greedy else min(1 / self.temperature, 1e3)


@np.errstate(over="ignore", invalid="ignore")  # logits that are not finite reach `draw`, which refuses them
def scores(logits: np.ndarray, sampling: Sampling, seen: np.ndarray | None = None) -> np.ndarray:
    """Logits (n, V) after all processors, in float32; -inf for excluded tokens. Greedy applies only the repetition penalty.

    Args:
        logits: (n, V) float32; never changed, but returned as they are if no processor applies.
        sampling: Sampling settings.
        seen: (n, V) bool, or (V,) for all rows: tokens of the prompt and the answer before each row; needed only for a penalty.

    Source: transformers' logits processors; Keskar et al. 2019, arXiv:1909.05858 (penalty); Holtzman et al. 2019, arXiv:1904.09751 (top-p);
    Nguyen et al. 2024, arXiv:2407.01082 (min-p).
    """
    out = logits
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ValueError("a repetition penalty needs the tokens seen")
        out, seen = logits.copy(), np.broadcast_to(seen, logits.shape)
        old = out[seen]
        out[seen] = np.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
    if sampling.greedy:
        return out
    if sampling.temperature < _COLD:  # else the quotient overflows, and no token would have a finite score
        out = out - out.max(-1, keepdims=True)
    out = out / np.float32(max(sampling.temperature, _FLOOR))
    if sampling.top_k and sampling.top_k < out.shape[-1]:
        out[out < np.partition(out, -sampling.top_k)[:, -sampling.top_k, None]] = -np.inf
    if sampling.top_p < 1:
        for row in out:
            _exclude_tail(row, sampling.top_p)
    if sampling.min_p:  # p < min_p * max(p), without the exponentials
        out[out < out.max(-1, keepdims=True) + np.float32(math.log(sampling.min_p))] = -np.inf
    return out


def _exclude_tail(row: np.ndarray, top_p: float) -> None:
    """Exclude the least likely tokens, whose probabilities sum to at most 1 - top_p, from a row (V,); the last ones of a tie."""
    ascending = np.sort(row[row > -np.inf])  # few after top_k
    if not len(ascending):
        return
    most = np.float32(1 - top_p)
    # transformers compares in float32, so a sum that rounds to `most` does not exceed it: the largest such sum
    limit = (float(most) + float(np.nextafter(most, np.float32(2)))) / 2
    limit = limit if np.float32(limit) == most else np.nextafter(limit, 0)
    p = softmax(ascending[None])
    first = _reach(p, _block_sums(p), np.array([limit]))[0]
    least = ascending[first]
    tied = np.flatnonzero(row == least)
    row[row < least] = -np.inf
    row[tied[np.searchsorted(ascending, least, "right") - first :]] = -np.inf


@np.errstate(invalid="ignore")
def softmax(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Softmax over the last axis of float32 x; `out` may be x."""
    p = np.subtract(x, x.max(-1, keepdims=True), out=out)
    np.exp(p, out=p)
    p /= p.sum(-1, keepdims=True)
    return p


def probabilities(logits: np.ndarray, sampling: Sampling, seen: np.ndarray | None = None) -> np.ndarray:
    """The distribution of each row, (n, V) float32; greedy puts all probability on the first maximum."""
    out = scores(logits, sampling, seen)
    if sampling.greedy:
        best = np.zeros_like(out)
        np.put_along_axis(best, out.argmax(-1)[:, None], 1, -1)
        return best
    return softmax(out, out)


def draw(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The token at quantile u of each row: (n, V) non-negative weights and (n,) float64 in [0, 1) → (n,) int64.

    A token of weight zero is never drawn; the rows need not sum to 1.

    Raises:
        ModelError: The weights of a row are not finite, or all zero.
    """
    sums = _block_sums(p)
    total = sums.sum(-1)
    if not ((total > 0) & (total < np.inf)).all():
        raise ModelError(_NOT_FINITE)
    return _reach(p, sums, u * total)


def _block_sums(weights: np.ndarray) -> np.ndarray:
    """(n, V) → (n, ⌈V / _BLOCK⌉) float64."""
    return np.add.reduceat(weights, np.arange(0, weights.shape[1], _BLOCK), -1, np.float64)


def _reach(weights: np.ndarray, sums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where the running sum of each row (n, V) first exceeds its target (n,) ≥ 0, or else the row's last positive weight: (n,) int64.

    It adds `sums`, those of `_block_sums`, and single weights only in the block that reaches the target, because numpy's cumsum is slow.
    """
    if sums.shape[1] == 1:
        return _first_above(weights, target)
    found = _first_above(sums, target)
    for i, block in enumerate(found):
        before = sums[i, :block].cumsum()[-1] if block else 0.0  # added as in `_first_above`: the target is not below it
        found[i] = block * _BLOCK + _first_above(weights[i, None, block * _BLOCK : (block + 1) * _BLOCK], target[i, None] - before)[0]
    return found


def _first_above(weights: np.ndarray, target: np.ndarray) -> np.ndarray:
    reached = weights.cumsum(-1, dtype=np.float64)
    target = np.minimum(target, np.nextafter(reached[:, -1], 0))  # rounding may give a target at the total
    return (reached > target[:, None]).argmax(-1)


def rate(logits: np.ndarray, token: int, rivals: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural log-probability of a token under logits (V,), and the `rivals` most likely tokens with theirs, best first, ties by id."""
    top = logits.max()
    total = np.log(np.exp(logits - top).sum())
    best = np.empty(0, np.int64)
    if count := min(rivals, len(logits)):
        best = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
        best = best[np.argsort(-logits[best], kind="stable")][:count]
    return float(logits[token] - top - total), tuple(zip(best.tolist(), (logits[best] - top - total).tolist(), strict=True))


class Uniforms:
    """Uniform random numbers by position: (seed, purpose, position) → [0, 1) in float64."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._seed = derive_seed(seed, purpose)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """Numbers of the positions start, ..., start + count - 1: (count,) float64."""
        return np.random.Generator(np.random.PCG64(self._seed).advance(start)).random(count)


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
        self._seen: np.ndarray | None = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(vocabulary, dtype=bool)
            self._seen[list(prompt)] = True

    @property
    def seen(self) -> np.ndarray | None:
        """The tokens so far, (V,) bool; None without a penalty."""
        return self._seen

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution of the next token, (1, V)."""
        return probabilities(logits, self.sampling, self._seen)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """`probabilities` before the softmax."""
        return scores(logits, self.sampling, self._seen)

    def next(self, logits: np.ndarray) -> int:
        """Draw the next token from logits (1, V) or (V,); call `take` to continue with it.

        Raises:
            ModelError: The logits are not finite.
        """
        logits = logits.reshape(1, -1)
        if not self.sampling.greedy:
            return int(draw(self.probabilities(logits), self.uniforms(self.count, 1))[0])
        token = int(self.scores(logits).argmax())  # the first NaN, if there is one
        if not math.isfinite(logits[0, token]):
            raise ModelError(_NOT_FINITE)
        return token

    def take(self, token: int) -> None:
        """Append this token to the answer."""
        self.count += 1
        if self._seen is not None:
            self._seen[token] = True

"""Rotary position embeddings as one complex product.

The rows of query and key weights are reordered into pairs on loading (`pairs`), so that a head is D/2 complex numbers and a rotation is a
product with exp(i * position * frequency). Attention uses only dot products of queries and keys, which do not depend on the channel order.
Channels that are not rotated (partial rotary embeddings, layers without positions) have the frequency 0.

Sources: Su et al. 2021, RoFormer, arXiv:2104.09864; YaRN, Peng et al. 2023, arXiv:2309.00071; LongRoPE, Ding et al. 2024,
arXiv:2402.13753, with the short factors; Llama 3's scaling and dynamic NTK as in transformers' modeling_rope_utils (same results).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ModelError
from fedtune.inference.engine.aligned import zeros
from fedtune.inference.engine.shape import RopeShape, Shape

Floats = NDArray[np.float32]
Turns = NDArray[np.complex64]


class Rope:
    """Tables of exp(i * position * frequency), which grow on demand.

    Args:
        shape: The decoder's shape.
        rope: The rotary embedding; None is `shape.rope`.

    Raises:
        ModelError: Its numbers do not fit each other.
    """

    def __init__(self, shape: Shape, rope: RopeShape | None = None) -> None:
        self._rope, self._width = rope or shape.rope, shape.rotary or shape.head_dim
        try:
            with np.errstate(all="ignore"):
                self._freqs, factor = frequencies(self._rope, self._width)
                fine = bool(np.isfinite(self._freqs).all()) and bool(np.isfinite(np.float32(factor)))
        except (ArithmeticError, ValueError):
            fine = False
        if not fine:
            raise ModelError(f"config.json's rope_parameters of rope_type={self._rope.kind!r} give no finite rotations: export it again")
        self._still = (shape.head_dim - self._width) // 2  # pairs that are not rotated
        self._factor = np.concatenate([np.full_like(self._freqs, factor), np.ones(self._still, np.float32)])
        self._known = int(self._rope.get("max_position_embeddings")) if self._rope.kind == "dynamic" else None
        self._table = np.empty((0, 1, shape.head_dim // 2), np.complex64)
        self._last: tuple[int, int, Turns] | None = None

    def rows(self, start: int, n: int) -> Turns:
        """[n, 1, D/2] for positions start..start+n-1."""
        last = self._last
        if last is None or last[0] != start or last[1] != n:  # reused by all layers of a pass
            self._last = last = start, n, self._rows(start, n)
        return last[2]

    def rotate(self, x: Floats, positions: NDArray[np.int64] | int) -> Floats:
        """Rotate each head of x by its position.

        Args:
            x: [n, H, D], channels in pairs.
            positions: [n] integers, or the first of n consecutive positions.

        Returns:
            [n, H, D], a new array.
        """
        turns = self.rows(positions, len(x)) if isinstance(positions, int) else self.at(positions)
        return (np.ascontiguousarray(x).view(np.complex64) * turns).view(np.float32)

    def at(self, positions: NDArray[np.int64]) -> Turns:
        """[n, 1, D/2] for any positions [n]."""
        last = int(positions.max()) + 1
        return (self.rows(0, last) if self._known and last > self._known else self._upto(last))[positions]

    def rows_of(self, spans: Sequence[tuple[int, int]]) -> Turns:
        """[rows, 1, D/2] for the spans (start, n) of several sequences; the base of dynamic scaling depends on a sequence's own length."""
        if self._known is not None:
            return np.concatenate([self._rows(start, n) for start, n in spans])
        return self.at(np.concatenate([np.arange(start, start + n) for start, n in spans]))

    def unrotate(self, x: Floats, start: int) -> Floats:
        """The inverse of `rotate(…, start)`, for keys that are already rotated or must not be."""
        turns = self.rows(start, len(x)).conj() / self._factor**2
        return (np.ascontiguousarray(x, np.float32).view(np.complex64) * turns).view(np.float32)

    def _rows(self, start: int, n: int) -> Turns:
        if self._known and start + n > self._known:  # dynamic: the base depends on the current length
            return self._make(frequencies(self._rope, self._width, start + n)[0], start, n)
        return self._upto(start + n)[start : start + n]

    def _upto(self, length: int) -> Turns:
        held = len(self._table)
        if held < length:
            self._table = self._make(self._freqs, 0, max(256, 2 * held, length))
        return self._table

    def _make(self, freqs: Floats, start: int, n: int) -> Turns:
        freqs = np.concatenate([freqs, np.zeros(self._still, np.float32)])
        angles = np.arange(start, start + n, dtype=np.float32)[:, None] * freqs
        out = zeros((n, 1, len(freqs)), np.complex64)
        out.real[:, 0], out.imag[:, 0] = self._factor * np.cos(angles), self._factor * np.sin(angles)
        return out


def pairs(heads: int, width: int, rotary: int = 0) -> NDArray[np.int64]:
    """The row order [heads * width] that puts channels i and i + rotary/2 of each head side by side; `rotary` is 0 for all of `width`.

    >>> pairs(1, 6).tolist(), pairs(1, 6, 4).tolist()
    ([0, 3, 1, 4, 2, 5], [0, 2, 1, 3, 4, 5])
    """
    rotary = rotary or width
    within = np.concatenate([np.arange(rotary).reshape(2, -1).T.ravel(), np.arange(rotary, width)])
    return (np.arange(heads)[:, None] * width + within).ravel()


def frequencies(rope: RopeShape, width: int, length: int | None = None) -> tuple[Floats, float]:
    """Return [width/2] float32 radians per position, and the factor on queries and keys.

    Args:
        rope: Base and scaling.
        width: Rotated channels of a head.
        length: Tokens so far; used only by dynamic scaling, beyond the model's context.
    """
    steps = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    if rope.kind == "none":
        return np.zeros_like(steps), 1.0
    if rope.kind == "dynamic":
        factor, context = rope.get("factor"), rope.get("max_position_embeddings")
        grown = factor * max(length or 0, context) / context - (factor - 1)
        return _powers(rope.theta * grown ** (width / (width - 2)), steps), 1.0
    plain = _powers(rope.theta, steps)
    if rope.kind == "linear":
        return plain / rope.get("factor"), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, width, steps)
    if rope.kind == "longrope":
        return _longrope(rope, plain)
    return plain, 1.0


def _powers(base: float, steps: Floats) -> Floats:
    """base ** -steps; numpy's float32 powers are off by more than their last bit."""
    return (base ** -steps.astype(np.float64)).astype(np.float32)


def _llama3(rope: RopeShape, plain: Floats) -> Floats:
    """Divide low frequencies by the factor, keep high ones, interpolate between."""
    factor, low, high = (rope.get(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope.get("original_max_position_embeddings") * plain / (2 * math.pi)  # rotations in the original context
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _longrope(rope: RopeShape, plain: Floats) -> tuple[Floats, float]:
    """The short factors, for texts within the original context: a longer text would need other keys for all of its tokens."""
    original = rope.get("original_max_position_embeddings")
    factor = rope.get("factor") or rope.get("max_position_embeddings") / original
    attention = rope.get("attention_factor") or (math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0)
    return plain / np.array(rope.get("short_factor"), np.float32), float(attention)


def _yarn(rope: RopeShape, width: int, steps: Floats) -> tuple[Floats, float]:
    original = rope.get("original_max_position_embeddings")
    factor = rope.get("factor") or rope.get("max_position_embeddings") / original

    def channel(turns: float) -> float:  # the channel with this many rotations in the original context
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.get("beta_fast", 32)), channel(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    slowed = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32((high - low) or 0.001), 0, 1)
    plain = _powers(rope.theta, steps)

    def grown(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale, whole = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = rope.get("attention_factor") or (grown(scale) / grown(whole) if scale and whole else grown())
    return plain / factor * slowed + plain * (1 - slowed), float(attention)

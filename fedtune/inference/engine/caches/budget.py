"""Chooses the best cache within a memory budget.

Policies from lossless to lossy: full, the model's own sliding window if every layer has one, 8, 4 and 2 bits, a window with sinks. The
first that holds all tokens within the budget is chosen; the last one holds as many as fit.
"""

import re
from dataclasses import dataclass

from fedtune.errors import ConfigError
from fedtune.inference.engine.bfloat16 import DTYPES
from fedtune.inference.engine.caches.base import Cache
from fedtune.inference.engine.caches.full import FullCache
from fedtune.inference.engine.caches.kivi import KiviCache
from fedtune.inference.engine.caches.window import WindowCache
from fedtune.inference.engine.shape import Shape

SINKS = 4
SMALLEST = 32  # tokens of the shortest useful window
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Parse "64MB", "1.5 GiB", "800k" or "65536" to bytes.

    Raises:
        ConfigError: It is not a positive size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text, re.IGNORECASE | re.ASCII)
    size = round(float(found[1]) * UNITS[(found[2] or "").upper()]) if found and len(found[1]) <= 20 else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a memory size: write for example 64MB, 1.5GiB or 65536")
    return size


def show_size(size: int) -> str:
    """
    >>> show_size(64_000_000), show_size(1536), show_size(12)
    ('64.0 MB', '1.5 kB', '12 B')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def show_least(size: int) -> str:
    """Format a size for use as an argument: rounded up, without a space.

    >>> show_least(64_000_001), show_least(9_216), show_least(12)
    ('64.1MB', '9.3kB', '12B')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            tenths = -(-size * 10 // unit)
            return f"{tenths // 10}.{tenths % 10}{name}"
    return f"{size}B"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A cache policy for a model.

    Args:
        shape: The model's shape.
        tokens: Maximum number of tokens.
        policy: full, window, kivi8, kivi4 or kivi2.
        window, sinks: Parameters of the policy `window`.
        dtype: Dtype of unquantized entries: float32 or bfloat16.
    """

    shape: Shape
    tokens: int
    policy: str = "full"
    window: int = 1024
    sinks: int = SINKS
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.policy not in ("full", "window", "kivi8", "kivi4", "kivi2"):
            raise ConfigError(f"there is no cache policy {self.policy!r}: choose full, window, kivi8, kivi4 or kivi2")

    @property
    def nbytes(self) -> int:
        """Bytes of the cache when it holds all tokens."""
        shape, tokens = self.shape, self.tokens
        if self.policy == "full":
            return _token(shape, self.dtype) * tokens
        if self.policy == "window":
            return WindowCache.bytes_for(shape, tokens, self.window, self.sinks, dtype=self.dtype)
        return KiviCache.bytes_for(shape, tokens, int(self.policy[4:]), dtype=self.dtype)

    def build(self) -> Cache:
        """Create an empty cache."""
        if self.policy == "full":
            return FullCache(self.shape, self.tokens, self.dtype)
        if self.policy == "window":
            return WindowCache(self.shape, self.tokens, self.window, self.sinks, dtype=self.dtype)
        return KiviCache(self.shape, self.tokens, int(self.policy[4:]), dtype=self.dtype)

    @property
    def sentence(self) -> str:
        """A description for the user."""
        if self.policy == "full":
            what = "all keys and values in full precision"
        elif self.policy != "window":
            what = f"keys and values in {self.policy[4:]} bits, the newest 128 tokens in full precision"
        elif self.sinks:
            what = f"only the first {self.sinks} and the newest {self.window} tokens"
        else:
            what = f"the model's own window of {self.window} tokens"
        return f"cache: {what}; {show_size(self.nbytes)} for a text of {self.tokens} tokens"


def choose(shape: Shape, tokens: int, budget: int, dtype: str = "float32") -> Choice:
    """Choose the first policy that holds `tokens` tokens in `budget` bytes, else the longest window.

    Raises:
        ConfigError: Not even the shortest useful window fits.
    """
    own = max((w or tokens for w in shape.windows), default=tokens)
    whole = [Choice(shape=shape, tokens=tokens, dtype=dtype)]
    if own < tokens:
        whole.append(Choice(shape=shape, tokens=tokens, policy="window", window=own, sinks=0, dtype=dtype))
    whole += [Choice(shape=shape, tokens=tokens, policy=f"kivi{bits}", dtype=dtype) for bits in (8, 4, 2)]
    for choice in whole:
        if choice.nbytes <= budget:
            return choice
    fewest = min((w for w in shape.windows if w is not None), default=tokens)
    sinks = min(SINKS, fewest - 1)
    empty = Choice(shape=shape, tokens=tokens, policy="window", window=1, sinks=sinks, dtype=dtype)
    window = 1 + (budget - empty.nbytes) // _token(shape, dtype)
    if window < SMALLEST:
        least = Choice(shape=shape, tokens=tokens, policy="window", window=SMALLEST, sinks=sinks, dtype=dtype).nbytes
        least = min([least, *(choice.nbytes for choice in whole)])
        raise ConfigError(
            f"a cache of {show_size(budget)} is too small for this model: give at least {show_least(least)} "
            f"for a text of {tokens} tokens, or use a shorter text"
        )
    return Choice(shape=shape, tokens=tokens, policy="window", window=window, sinks=sinks, dtype=dtype)


def _token(shape: Shape, dtype: str) -> int:
    """Bytes of one token in full precision."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * DTYPES[dtype].itemsize

"""Where noise and sampling come from: a seed that repeats, or the operating system.

A plan's seed is known to the server. Noise that hangs on it could be subtracted, so that a seeded source proves nothing to anybody who
holds the seed: it is there for simulations, which must repeat bit for bit. `privacy.secure_rng=true` draws from the operating system.
"""

import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedtune.contracts.seeds import derive_seed


class Source(Protocol):
    """What a mechanism draws from."""

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        """float64 N(0, std²)."""
        ...

    def chosen(self, count: int, rate: float) -> list[int]:
        """Of the numbers below `count`, each with probability `rate` on its own: Poisson sampling."""
        ...


class Seeded:
    """Repeats; for simulations.

    Args:
        parts: What the seed hangs on.
    """

    def __init__(self, *parts: int | str) -> None:
        self._generator = torch.Generator().manual_seed(derive_seed(*parts))

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64) * std

    def chosen(self, count: int, rate: float) -> list[int]:
        return (torch.rand(count, generator=self._generator, dtype=torch.float64) < rate).nonzero().flatten().tolist()


class System:
    """The operating system's randomness, which no peer can know.

    A normal number is half the sum of four, so that the gaps between float64 values give nothing away (Holohan & Braghin 2021, Secure
    Random Sampling in Differential Privacy, arXiv:2107.10138).
    """

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        uniform = torch.from_numpy(_uniform(4 * int(np.prod(shape, dtype=np.int64)))).view(4, *shape)
        return torch.special.ndtri(uniform).sum(0) * (std / 2)

    def chosen(self, count: int, rate: float) -> list[int]:
        return np.flatnonzero(_uniform(count) < rate).tolist()


def source(secure: bool, *parts: int | str) -> Source:
    """The operating system where `secure`, else a generator seeded with `parts`."""
    return System() if secure else Seeded(*parts)


def _uniform(count: int) -> np.ndarray:
    """float64 (count,) strictly between 0 and 1: the middles of 2⁵² intervals, which a float64 can hold."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52

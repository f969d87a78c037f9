"""Random sources for noise and sampling: a seeded generator, or the operating system.

The server knows a plan's seed and could subtract noise derived from it, so a seeded source gives no privacy against anyone who knows the
seed. It is for simulations, which must repeat bit for bit. `privacy.secure_rng=true` draws from the operating system.
"""

import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedtune.contracts.seeds import derive_seed


class Source(Protocol):
    """A random source of a privacy mechanism."""

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        """float64 N(0, std²)."""
        ...

    def chosen(self, count: int, rate: float) -> list[int]:
        """A Poisson sample of the numbers below `count`: each is included independently with probability `rate`."""
        ...


class Seeded:
    """A repeatable source, for simulations.

    Args:
        parts: Parts that the seed is derived from.
    """

    def __init__(self, *parts: int | str) -> None:
        self._generator = torch.Generator().manual_seed(derive_seed(*parts))

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64) * std

    def chosen(self, count: int, rate: float) -> list[int]:
        return (torch.rand(count, generator=self._generator, dtype=torch.float64) < rate).nonzero().flatten().tolist()


class System:
    """The operating system's randomness, which peers cannot know.

    A normal number is half the sum of four, so that the gaps between float64 values disclose nothing (Holohan & Braghin 2021, Secure Random
    Sampling in Differential Privacy, arXiv:2107.10138).
    """

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        uniform = torch.from_numpy(_uniform(4 * int(np.prod(shape, dtype=np.int64)))).view(4, *shape)
        return torch.special.ndtri(uniform).sum(0) * (std / 2)

    def chosen(self, count: int, rate: float) -> list[int]:
        return np.flatnonzero(_uniform(count) < rate).tolist()


def source(secure: bool, *parts: int | str) -> Source:
    """The operating system's source if `secure`, else a generator seeded with `parts`."""
    return System() if secure else Seeded(*parts)


def _uniform(count: int) -> np.ndarray:
    """float64 (count,) strictly between 0 and 1: the midpoints of 2⁵² intervals, which float64 represents exactly."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52

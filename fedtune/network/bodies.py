"""Bounds the memory of one caller: a request's body is held until Flower has taken it, and Flower takes one request after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Bodies:
    """Counts the bytes that each caller's requests hold.

    Args:
        most: Largest sum of one caller, in bytes.
    """

    most: int

    def __post_init__(self) -> None:
        self._held: dict[bytes, int] = {}

    @contextmanager
    def of(self, caller: bytes) -> Iterator["Body"]:
        """Counts one request's body, and forgets it at the end."""
        body = Body(self, caller)
        try:
            yield body
        finally:
            left = self._held.get(caller, 0) - body.size
            self._held[caller] = left
            if not left:
                del self._held[caller]

    def add(self, caller: bytes, size: int) -> bool:
        """Add bytes to a caller's sum; False, and nothing added, where that is too large."""
        if self._held.get(caller, 0) + size > self.most:
            return False
        self._held[caller] = self._held.get(caller, 0) + size
        return True


class Body:
    """One request's share of its caller's sum."""

    def __init__(self, bodies: Bodies, caller: bytes) -> None:
        self._bodies, self._caller, self.size = bodies, caller, 0

    def grow(self, size: int) -> bool:
        """Add bytes to the body; False, and nothing added, where its caller's sum is then too large."""
        if not self._bodies.add(self._caller, size):
            return False
        self.size += size
        return True

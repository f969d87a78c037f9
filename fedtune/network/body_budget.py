"""Bounds the memory that one caller can use: a request's body is held until Flower takes it, and Flower takes one request at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class BodyBudget:
    """Counts the bytes of each caller's request bodies.

    Args:
        most: Largest sum per caller, in bytes.
    """

    most: int

    def __post_init__(self) -> None:
        self._held: dict[bytes, int] = {}

    @contextmanager
    def of(self, caller: bytes) -> Iterator["BodyBytes"]:
        """Count one request's body until the context ends."""
        body = BodyBytes(self, caller)
        try:
            yield body
        finally:
            left = self._held.get(caller, 0) - body.size
            self._held[caller] = left
            if not left:
                del self._held[caller]

    def add(self, caller: bytes, size: int) -> bool:
        """Add bytes to a caller's sum. Returns False, without adding, if the sum would be too large."""
        if self._held.get(caller, 0) + size > self.most:
            return False
        self._held[caller] = self._held.get(caller, 0) + size
        return True


class BodyBytes:
    """One request's share of its caller's sum."""

    def __init__(self, budget: BodyBudget, caller: bytes) -> None:
        self._budget, self._caller, self.size = budget, caller, 0

    def grow(self, size: int) -> bool:
        """Add bytes to the body. Returns False, without adding, if its caller's sum would be too large."""
        if not self._budget.add(self._caller, size):
            return False
        self.size += size
        return True

"""A channel for tests of exchanges without a round loop."""

from collections.abc import Iterator, Mapping

from flwr.app import RecordDict

from fedtune.contracts.plan import Update
from fedtune.exchange import NoUpdates


class FixedChannel:
    """A channel with given updates."""

    def __init__(self, updates: list[Update]) -> None:
        self._updates, self.cohort = updates, [u.client for u in updates]

    def ask(self, stage: str, contents: Mapping[str, RecordDict]) -> Iterator[tuple[str, RecordDict]]:
        raise NotImplementedError

    def train(self) -> Iterator[Update]:
        if not self._updates:
            raise NoUpdates
        return iter(self._updates)

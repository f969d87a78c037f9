"""What stands between the round loop and the strategy: how the replies of a cohort become the next state."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from flwr.app import RecordDict
from torch import Tensor

from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState, Strategy


class NoUpdates(Exception):
    """No client of the cohort has sent a good update: the round does not count."""


class Channel(Protocol):
    """One round's way to its cohort. Clients that fail to answer are named by the channel and are not in what it yields."""

    @property
    def cohort(self) -> Sequence[str]:
        """The clients that are asked, in order."""
        ...

    def ask(self, stage: str, contents: Mapping[str, RecordDict]) -> Iterator[tuple[str, RecordDict]]:
        """Send each client a message of type `query.STAGE`; yields the replies in the order of logical ids."""
        ...

    def train(self) -> Iterator[Update]:
        """Send each client its assignment; yields the checked updates in the order of logical ids, then those of earlier rounds.

        Raises:
            NoUpdates: There is none; raised when the iteration begins.
        """
        ...


class Exchange(abc.ABC):
    """How a cohort's replies become the next state: which messages are sent, and what the strategy gets to see of the answers.

    One instance serves a whole run and keeps nothing between rounds but `ServerState.exchange`.
    """

    def start(self) -> Mapping[str, Tensor]:
        """`ServerState.exchange` before round 1."""
        return {}

    def left_out(self, round: int, clients: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        """Clients of the cohort that must not be asked this round → the kind of reason, and a sentence."""
        return {}

    @abc.abstractmethod
    def run(self, round: int, state: ServerState, strategy: Strategy, channel: Channel) -> ServerState:
        """All messages of one round, and the state after it.

        Raises:
            NoUpdates: The round does not count.
        """

    def figures(self, round: int, before: ServerState, after: ServerState) -> Mapping[str, float]:
        """Numbers for the round's line of the metrics."""
        return {}

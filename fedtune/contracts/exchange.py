"""The exchange between the round loop and the strategy: it turns a cohort's replies into the next state."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from flwr.app import RecordDict
from torch import Tensor

from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState, Strategy


class NoUpdates(Exception):
    """No client of the cohort sent a good update, so the round fails."""


class Channel(Protocol):
    """Sends one round's messages to its cohort. It records clients that fail to answer and does not yield them."""

    @property
    def cohort(self) -> Sequence[str]:
        """The clients of this round, in order."""
        ...

    def ask(self, stage: str, contents: Mapping[str, RecordDict]) -> Iterator[tuple[str, RecordDict]]:
        """Send each client a message of type `query.STAGE`, and yield the replies in the order of logical ids."""
        ...

    def train(self) -> Iterator[Update]:
        """Send each client its assignment. Yield the checked updates in the order of logical ids, then late updates of earlier rounds.

        Raises:
            NoUpdates: There is no update.
        """
        ...


class Exchange(abc.ABC):
    """Turns a cohort's replies into the next state: it defines the messages and the data that the strategy gets from the replies.

    One instance is used for a whole run. Its only state between rounds is `ServerState.exchange`.
    """

    def start(self) -> Mapping[str, Tensor]:
        """`ServerState.exchange` before round 1."""
        return {}

    def exclusions(self, round: int, clients: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        """Clients of the cohort to exclude from this round → (kind of reason, explanation)."""
        return {}

    @abc.abstractmethod
    def run(self, round: int, state: ServerState, strategy: Strategy, channel: Channel) -> ServerState:
        """Exchange all messages of one round, and return the state after it.

        Raises:
            NoUpdates: The round fails.
        """

    def figures(self, round: int, before: ServerState, after: ServerState) -> Mapping[str, float]:
        """Extra numbers for the round's line of the metrics."""
        return {}

"""Replies that come after their round, and count in a later one.

What a client adds to the version that it was sent can be added to a later version too, the less the older it is:

    w_k ← w_t + Δ_k / √(1 + s),   Δ_k = w_k − w_τ,   s = t − τ

The strategy gets that w_k with the weight n_k as any other, so that its mean moves by Σ p_k Δ_k / √(1 + s_k): a server optimizer sees
FedBuff's step, and an update that is in time (s = 0) is what it was. s counts rounds, also those that did not count.

Source: Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation, arXiv:2106.06639 (FedBuff, which scales so); Xie,
Koyejo, Gupta 2019, Asynchronous Federated Optimization, arXiv:1903.03934, section 5.2 (the polynomial a = 1/2).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import LateUpdate, Update
from fedtune.contracts.strategy import Assignment


@dataclass(frozen=True, kw_only=True)
class Awaited:
    """A message whose reply may still come.

    Args:
        message: Its id on Flower's grid.
        assignment: What it asked.
        examples: Rows that the client had said it has.
        nbytes: Bytes of the message on the network.
    """

    message: str
    assignment: Assignment
    examples: int
    nbytes: int


Key = tuple[str, int]
"""(logical id, round that the client was asked in)."""


class Latecomers:
    """What rounds did not wait for, as long as it may still be used. With late=drop it never holds anything.

    A client that is in here sits the rounds out: it would be at its older turn still, and fall behind for good.

    Args:
        config: The experiment.
        kept: Updates of an earlier process that wait for their round.
    """

    def __init__(self, config: Config, kept: Iterable[LateUpdate] = ()) -> None:
        self._used, self._most, self._deadline = config.late == "use", config.max_staleness, config.devices.deadline_s
        self._kept: dict[Key, LateUpdate] = {(late.update.client, late.update.round): late for late in kept}
        self._awaited: dict[Key, Awaited] = {}

    @property
    def kept(self) -> tuple[LateUpdate, ...]:
        """What a checkpoint must hold. Messages without a reply are none of it: they end with Flower's run."""
        return tuple(self._kept[key] for key in sorted(self._kept))

    def busy(self, round: int) -> set[str]:
        """Clients that are still at an older turn; turns that are too old now are given up."""
        self._awaited = {key: awaited for key, awaited in self._awaited.items() if round - key[1] <= self._most}
        return {client for client, _ in [*self._kept, *self._awaited]}

    def expect(self, awaited: Awaited) -> None:
        """A reply did not come in its round."""
        if self._used:
            self._awaited[awaited.assignment.plan.client, awaited.assignment.plan.round] = awaited

    def keep(self, update: Update, assignment: Assignment, took_s: float) -> None:
        """A simulated device answered after the deadline: its update is there so many rounds later, each as long as the deadline."""
        rounds = math.ceil(took_s / self._deadline) - 1 if self._deadline else 0
        if self._used and rounds <= self._most:
            late = LateUpdate(update=difference(update, assignment.adapter), due=update.round + rounds)
            self._kept[update.client, update.round] = late

    def take(self, round: int) -> Iterator[LateUpdate]:
        """The kept updates that are there in this round, in the order of logical ids; each is handed out once."""
        for key in sorted(key for key, late in self._kept.items() if late.due <= round):
            yield self._kept.pop(key)

    def awaited(self) -> list[Awaited]:
        """Messages whose reply may come, in the order of logical ids and, for a client, the newest first."""
        return [self._awaited[key] for key in sorted(self._awaited, key=lambda key: (key[0], -key[1]))]

    def came(self, awaited: Awaited) -> None:
        """A reply, or the news that there will be none."""
        self._awaited.pop((awaited.assignment.plan.client, awaited.assignment.plan.round))


def difference(update: Update, start: AdapterState) -> Update:
    """The update with Δ = w − w_τ in place of w."""
    deltas = {
        n: (t.double() - start[n].double()).to(torch.promote_types(t.dtype, torch.float32)) for n, t in update.adapter.tensors.items()
    }
    return dataclasses.replace(update, adapter=update.adapter.replace(deltas))


def caught_up(late: LateUpdate, now: AdapterState, staleness: int) -> Update:
    """The update as if its client had been sent the version of today: w = w_t + Δ / √(1 + s), with the dtypes of `now`."""
    scale, deltas = 1.0 / math.sqrt(1.0 + staleness), late.update.adapter.tensors
    tensors = {n: (now[n].double() + scale * d.double()).to(now[n].dtype) for n, d in deltas.items()}
    return dataclasses.replace(late.update, adapter=now.replace(tensors))

"""Staleness: late updates, which arrive after their round and are aggregated in a later one.

A late update is applied as its difference from the version that the client received, scaled down by its age:

    w_k ← w_t + Δ_k / √(1 + s),   Δ_k = w_k − w_τ,   s = t − τ

w_t is the current version, w_τ the received one. The strategy gets this w_k with weight n_k like any other update, so the mean moves by
Σ p_k Δ_k / √(1 + s_k), which is FedBuff's step. An update in time (s = 0) is unchanged. s counts all rounds, including failed ones.

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
class PendingReply:
    """A message whose reply may arrive in a later round.

    Args:
        message: Its id on Flower's grid.
        assignment: The client's assignment.
        examples: Rows that the client's hello reported.
        nbytes: Bytes of the message on the network.
    """

    message: str
    assignment: Assignment
    examples: int
    nbytes: int


Key = tuple[str, int]
"""(logical id, round of the client's assignment)."""


class LateUpdates:
    """Late updates and pending replies that may still be used. Always empty with late=drop.

    A client with an entry here gets no new assignment: it is still working on an older turn and would never catch up.

    Args:
        config: The experiment.
        kept: Late updates restored from a checkpoint.
    """

    def __init__(self, config: Config, kept: Iterable[LateUpdate] = ()) -> None:
        self._used, self._max_staleness, self._deadline = config.late == "use", config.max_staleness, config.devices.deadline_s
        self._kept: dict[Key, LateUpdate] = {(late.update.client, late.update.round): late for late in kept}
        self._pending: dict[Key, PendingReply] = {}

    @property
    def kept(self) -> tuple[LateUpdate, ...]:
        """Updates to checkpoint. Unanswered messages are not stored; they are lost when the Flower run ends."""
        return tuple(self._kept[key] for key in sorted(self._kept))

    def busy(self, round: int) -> set[str]:
        """Clients that are still working on an older turn. Discards pending replies that are now too old to be used."""
        self._pending = {key: pending for key, pending in self._pending.items() if round - key[1] <= self._max_staleness}
        return {client for client, _ in [*self._kept, *self._pending]}

    def expect(self, pending: PendingReply) -> None:
        """Wait for a reply that did not arrive in its round."""
        if self._used:
            self._pending[pending.assignment.plan.client, pending.assignment.plan.round] = pending

    def keep(self, update: Update, assignment: Assignment, duration_s: float) -> None:
        """Keep the update of a simulated device that missed the deadline. It is due ⌈duration_s / deadline⌉ − 1 rounds later."""
        rounds = math.ceil(duration_s / self._deadline) - 1 if self._deadline else 0
        if self._used and rounds <= self._max_staleness:
            late = LateUpdate(update=difference(update, assignment.adapter), due=update.round + rounds)
            self._kept[update.client, update.round] = late

    def take(self, round: int) -> Iterator[LateUpdate]:
        """Remove and yield the kept updates that are due in this round, in the order of logical ids."""
        for key in sorted(key for key, late in self._kept.items() if late.due <= round):
            yield self._kept.pop(key)

    def pending(self) -> list[PendingReply]:
        """The pending replies, in the order of logical ids and, for one client, newest first."""
        return [self._pending[key] for key in sorted(self._pending, key=lambda key: (key[0], -key[1]))]

    def resolve(self, pending: PendingReply) -> None:
        """Stop waiting for a reply."""
        self._pending.pop((pending.assignment.plan.client, pending.assignment.plan.round))


def difference(update: Update, start: AdapterState) -> Update:
    """The update with Δ = w − w_τ instead of w."""
    deltas = {
        n: (t.double() - start[n].double()).to(torch.promote_types(t.dtype, torch.float32)) for n, t in update.adapter.tensors.items()
    }
    return dataclasses.replace(update, adapter=update.adapter.replace(deltas))


def apply_staleness(late: LateUpdate, now: AdapterState, staleness: int) -> Update:
    """The late update applied to the current version: w = w_t + Δ / √(1 + s), with the dtypes of `now`."""
    scale, deltas = 1.0 / math.sqrt(1.0 + staleness), late.update.adapter.tensors
    tensors = {n: (now[n].double() + scale * d.double()).to(now[n].dtype) for n, d in deltas.items()}
    return dataclasses.replace(late.update, adapter=now.replace(tensors))

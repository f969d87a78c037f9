"""A weighted mean of tensors, computed one update at a time."""

import abc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState, Strategy


class Mean:
    """Σ p_k w_k with p_k = n_k / Σ n, for each tensor; needs the memory of one model in float64 for any number of clients.

    In float64, n_k · w_k of a float32 w_k is exact, so that the mean of a single client equals its tensors bit for bit.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._total: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's tensors; names and shapes must be the same for every client."""
        self.weight += weight
        for name, tensor in tensors.items():
            if name not in self._total:
                self._total[name] = torch.zeros_like(tensor, dtype=torch.float64)
            self._total[name].add_(tensor.double(), alpha=weight)

    def of(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean, in the order of `like` and with its dtypes; names that no client has are left out."""
        return {n: (self._total[n] / self.weight).to(t.dtype) for n, t in like.items() if n in self._total}


def mean_of(updates: Iterable[Update], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ p_k w_k with p_k = n_k / Σ n, with the dtypes of `like`; reads the updates one at a time."""
    mean = Mean()
    for update in updates:
        mean.add(update.adapter.tensors, update.examples)
    return mean.of(like)


def doubles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() for n, t in tensors.items()}


class MeanStrategy(Strategy):
    """Base class of strategies that depend on the updates only through their mean with p_k = n_k / Σ n. They define `aggregate_mean`."""

    @abc.abstractmethod
    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState: ...

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        return self.aggregate_mean(round, state, mean_of(updates, doubles(state.adapter.tensors)))

"""The weighted mean that nearly every method takes of something, folded one update at a time."""

import abc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtune.contracts.plan import Update
from fedtune.contracts.strategy import ServerState, Strategy


class Mean:
    """Σ p_k w_k with p_k = n_k / Σ n, tensor by tensor; holds one model in float64, however many are added.

    float64: n_k · w_k of a float32 w_k is exact, so that one client alone comes back bit for bit.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._total: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Add one client's tensors; each client must bring the same names and shapes."""
        self.weight += weight
        for name, tensor in tensors.items():
            if name not in self._total:
                self._total[name] = torch.zeros_like(tensor, dtype=torch.float64)
            self._total[name].add_(tensor.double(), alpha=weight)

    def of(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of what was added, in the order of `like` and with its dtypes; names that nobody brought are left out."""
        return {n: (self._total[n] / self.weight).to(t.dtype) for n, t in like.items() if n in self._total}


def mean_of(updates: Iterable[Update], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Σ p_k w_k with p_k = n_k / Σ n, with the dtypes of `like`, folded one update at a time."""
    mean = Mean()
    for update in updates:
        mean.add(update.adapter.tensors, update.examples)
    return mean.of(like)


def doubles(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() for n, t in tensors.items()}


class MeanStrategy(Strategy):
    """A strategy that needs only the weighted mean of the updates, with p_k = n_k / Σ n: it defines `aggregate_mean`."""

    @abc.abstractmethod
    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState: ...

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        return self.aggregate_mean(round, state, mean_of(updates, doubles(state.adapter.tensors)))

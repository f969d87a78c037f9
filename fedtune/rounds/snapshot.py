"""The sum of the merged shifts as one dense matrix, for weights whose shifts have larger factors than the matrix.

A client updates its weights by adding its missing shifts, W = W0 + Σ s·B·A. After some rounds, the factors take more bytes than the matrix;
a new client then gets the sum instead. The server adds shifts in the same order and arithmetic as clients do, so a client that gets the sum
has bit for bit the same weights as a client that has participated from the start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState

METHOD = "sum"  # the spec's method of a snapshot, whose tensors `<module>.weight` (out, in) sum all shifts up to its version


class Snapshots:
    """Keeps the sums of shifts for the matrices that are smaller than the shifts' factors, and updates them each round."""

    def __init__(self) -> None:
        self._versions: tuple[int, ...] = ()
        self._sums: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}

    def of(self, shifts: Sequence[AdapterState]) -> AdapterState | None:
        """The snapshot of these shifts, given oldest first; None if the factors of every matrix are smaller than the matrix."""
        versions = tuple(s.spec.version for s in shifts)
        if versions[: len(self._versions)] != self._versions:  # the run resumed from an older round
            self.__init__()
        for i in range(len(self._versions), len(shifts)):
            self._add(shifts, i)
        self._versions = versions
        if not self._sums:
            return None
        spec = AdapterSpec(method=METHOD, base=shifts[-1].spec.base, version=versions[-1])
        return AdapterState({f"{module}.weight": total.clone() for module, total in self._sums.items()}, spec)

    def _add(self, shifts: Sequence[AdapterState], i: int) -> None:
        for module in shifts[i].spec.ranks:
            if module in self._sums:
                self._sums[module] += shifts[i].product(module)
                continue
            a, b = shifts[i][f"{module}.lora_A"], shifts[i][f"{module}.lora_B"]
            self._ranks[module] = rank = self._ranks.get(module, 0) + len(a)
            if rank * (a.shape[1] + len(b)) > a.shape[1] * len(b):
                total = torch.zeros(len(b), a.shape[1])
                for shift in (s for s in shifts[: i + 1] if module in s.spec.ranks):
                    total += shift.product(module)
                self._sums[module] = total

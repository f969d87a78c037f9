"""What has been merged into the frozen weights, as one matrix where the shifts' factors together are larger than the matrix.

A client brings its weights to a version by adding the shifts that it lacks, W = W0 + Σ s·B·A. After some rounds their factors take more
bytes than the matrices that they change. Then a newcomer gets the sum itself. Clients add shifts in the same order and in the same
arithmetic, so that one which gets the sum holds the same weights, bit for bit, as one which was there all the time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.contracts.adapter_state import AdapterSpec, AdapterState

METHOD = "sum"  # of a snapshot: `<module>.weight` (out, in), what all shifts up to its version have added


class Snapshots:
    """Keeps the sums, from round to round, of the matrices that are smaller than their factors."""

    def __init__(self) -> None:
        self._versions: tuple[int, ...] = ()
        self._sums: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}

    def of(self, shifts: Sequence[AdapterState]) -> AdapterState | None:
        """The snapshot of these shifts, oldest first; None where the factors of each matrix are smaller than it is."""
        versions = tuple(s.spec.version for s in shifts)
        if versions[: len(self._versions)] != self._versions:  # a run that went back to an older round
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

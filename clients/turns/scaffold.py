"""SCAFFOLD's corrected step: along g + c − c_k, where the server sends c − c_k.

Source: Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, arXiv:1910.06378, algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import Batch, Stack, Turn, Work, add_gradient
from fedtune.contracts.plan import matching


class Corrected(Batch):
    """Each client's own correction; zeros for a client that was sent none."""

    def __init__(self, turns: Sequence[Any], stack: Stack) -> None:
        some = {n for extra in stack.extras for n in extra}
        self._added = {n: _laid([extra.get(n) for extra in stack.extras], stack.views[n]) for n in stack.trained if n in some}

    def step(self, stack: Stack) -> None:
        for name, added in self._added.items():
            add_gradient(stack.views[name], added[list(stack.rows)])


def _laid(rows: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """(C, *shape)"""
    out = torch.zeros(len(rows), *like.shape[1:], device=like.device)
    for place, tensor in zip(out, rows, strict=True):
        if tensor is not None:
            place[tuple(slice(d) for d in tensor.shape)] = tensor.to(like.device)
    return out


@dataclass(frozen=True, kw_only=True)
class Scaffold(Turn):
    """Adds `work.extra`, name by name, to the gradient of every step."""

    private: ClassVar[bool] = True
    batch: ClassVar[type[Batch] | None] = Corrected

    def begin(self, work: Work) -> list[tuple[Tensor, Tensor]]:
        device, parameters = work.live.backbone.device, work.live.parameters
        names = set(matching(parameters, work.plan.train))
        return [(parameters[n], added.to(device)) for n, added in work.extra.items() if n in names]

    def step(self, work: Work, memory: list[tuple[Tensor, Tensor]]) -> None:
        for parameter, added in memory:
            add_gradient(parameter, added)

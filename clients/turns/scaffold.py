"""SCAFFOLD's corrected step along g + c − c_k; the server sends c − c_k.

Source: Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, arXiv:1910.06378, algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedtune.clients.turns._base import BatchedTurn, Stack, Turn, Work, add_gradient
from fedtune.contracts.plan import matching


class BatchedCorrection(BatchedTurn):
    """The corrections of all clients; zeros for a client without one."""

    def __init__(self, turns: Sequence[Any], stack: Stack) -> None:
        names = {n for extra in stack.extras for n in extra}
        self._corrections = {n: _stacked([extra.get(n) for extra in stack.extras], stack.views[n]) for n in stack.trained if n in names}

    def step(self, stack: Stack) -> None:
        for name, correction in self._corrections.items():
            add_gradient(stack.views[name], correction[list(stack.rows)])


def _stacked(rows: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The clients' tensors, zero-padded, as one tensor (C, *shape); zeros for None."""
    out = torch.zeros(len(rows), *like.shape[1:], device=like.device)
    for place, tensor in zip(out, rows, strict=True):
        if tensor is not None:
            place[tuple(slice(d) for d in tensor.shape)] = tensor.to(like.device)
    return out


@dataclass(frozen=True, kw_only=True)
class Scaffold(Turn):
    """Adds each tensor of `work.extra` to the gradient of the parameter of the same name, in every step."""

    private: ClassVar[tuple[str, ...]] = ("record", "user")
    batched: ClassVar[type[BatchedTurn] | None] = BatchedCorrection

    def begin(self, work: Work) -> list[tuple[Tensor, Tensor]]:
        device, parameters = work.live.backbone.device, work.live.parameters
        names = set(matching(parameters, work.plan.train))
        return [(parameters[n], correction.to(device)) for n, correction in work.extra.items() if n in names]

    def step(self, work: Work, memory: list[tuple[Tensor, Tensor]]) -> None:
        for parameter, correction in memory:
            add_gradient(parameter, correction)

"""Tensors that a turn trains beside the live ones, on the same minibatches."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedtune.clients.steps import lr_at, optimizer_of, steps_of
from fedtune.clients.turns._base import Work
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import matching
from fedtune.errors import CheckpointError, PlanError, UpdateError
from fedtune.models import LiveAdapter


class Beside:
    """A second copy of the trained tensors with its own optimizer. Values are those of the live parameters, which for some methods
    are the state's plus an origin.

    Args:
        work: The turn, with the live slot holding the turn's start.
        state: The first values.
    """

    def __init__(self, work: Work, state: AdapterState) -> None:
        if not isinstance(work.live, LiveAdapter):
            raise PlanError(f"the turn '{work.plan.turn}' trains an adapter, but the adapter has method 'sparse': change the strategy")
        self._work, self._live, self._state, self._done = work, work.live, state, 0
        self._steps = steps_of(work.plan, len(work.examples))
        names = matching(work.live.parameters, work.plan.train)
        work.live.load(state)
        self.parameters = {n: nn.Parameter(work.live.parameters[n].detach().clone()) for n in names}
        work.live.load(work.start)
        self._optimizer = optimizer_of(work.plan, list(self.parameters.values()))

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One step of the plan's optimizer, with its learning rate and clipping."""
        plan = self._work.plan
        for group in self._optimizer.param_groups:
            group["lr"] = lr_at(plan, self._done, self._steps)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone() if name in gradients else None
        params = list(self.parameters.values())
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if not torch.isfinite(norm):
            raise UpdateError(
                f"the gradient of the personal adapter became {norm.item()} in step {self._done + 1}: delete the state that the client"
                " stored for this turn"
            )
        if plan.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(params, plan.clip_norm, norm)
        self._optimizer.step()
        self._done += 1

    def state(self) -> AdapterState:
        """A copy of the tensors, with the ranks of the first state."""
        origin, tensors = self._live.origin, dict(self._state.tensors)
        for name, parameter in self.parameters.items():
            value = parameter.detach() - origin[name] if name in origin else parameter.detach()
            value = value[tuple(map(slice, tensors[name].shape))]
            tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return self._state.replace(tensors)


def put(work: Work, values: Mapping[str, Tensor]) -> None:
    """Copy values into the live parameters of these names."""
    with torch.no_grad():
        for name, value in values.items():
            work.live.parameters[name].copy_(value)


def values_of(work: Work) -> dict[str, Tensor]:
    """A copy of the live values of the trained tensors."""
    return {n: work.live.parameters[n].detach().clone() for n in matching(work.live.parameters, work.plan.train)}


def gradients_of(work: Work) -> dict[str, Tensor]:
    """A copy of the gradients of the trained tensors; a tensor without one is left out."""
    live = work.live.parameters
    return {n: g.clone() for n in matching(live, work.plan.train) if (g := live[n].grad) is not None}


def set_gradients(work: Work, gradients: Mapping[str, Tensor]) -> None:
    """Replace the gradients of the trained tensors."""
    for name in matching(work.live.parameters, work.plan.train):
        work.live.parameters[name].grad = gradients.get(name)


def with_number(state: AdapterState, name: str, number: float) -> AdapterState:
    """A state to keep, with a number beside its tensors."""
    return state.replace({**state.tensors, name: torch.tensor(number, dtype=torch.float64)})


def split_number(kept: AdapterState, name: str) -> tuple[AdapterState, float]:
    """The state and the number of `with_number`.

    Raises:
        CheckpointError: The number is missing or not finite.
    """
    value = float(kept[name]) if name in kept.tensors and kept[name].numel() == 1 else math.nan
    if not math.isfinite(value):
        raise CheckpointError(f"the client's stored state lacks '{name}': delete the state that the client stored for this turn")
    return kept.replace({n: t for n, t in kept.tensors.items() if n != name}), value

"""DiLoCo: an outer optimizer, SGD with Nesterov momentum, over rare rounds of many local AdamW steps; it wraps another strategy.

    v ← μ·v + Δ,   w ← w − η·(Δ + μ·v)        Δ = w − (the inner strategy's result)

η = 1, μ = 0 is the inner strategy. Clients continue their AdamW state from turn to turn, two tensors for each trained tensor, which never
leave them. The paper takes some 500 local steps a round (client.steps) and trains whole models; here w is the adapter.

Source: Douillard et al. 2023, DiLoCo: Distributed Low-Communication Training of Language Models, arXiv:2311.08105, algorithm 1. The paper's
inner strategy is the plain mean.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedtune.config import Config
from fedtune.config.bounds import require
from fedtune.config.registry import Registry
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, Requirements, ServerState, Strategy
from fedtune.errors import ConfigError

_STRATEGIES = Registry("fedtune.strategies", "fedtune.contracts.strategy.Strategy")
_OWN = "outer/"
_STRETCH = (
    2.31  # AdamW with moments of earlier turns: at most (1 − β1) / √((1 − β2)·(1 − β1² / β2)) = 7.3·lr a step, with a new state 3.2·lr
)


@dataclass(frozen=True, kw_only=True)
class DiLoCo(Strategy):
    """The outer step over the inner strategy's. Memory: `outer/<tensor>`, v in float64, beside the inner strategy's own.

    Its requirements are those of the inner strategy. After an inner strategy that rotates factors (fedrot), a client's kept moments are
    those of its factors before the rotation.

    Args:
        inner: The strategy that plans the turns and combines the updates: a name of `conf/strategy/`.
        settings: The inner strategy's arguments.
        lr: Outer learning rate η.
        momentum: μ.
        keep_optimizer: Whether clients continue their AdamW state; false resets it in every turn.
    """

    requirements: ClassVar[Requirements] = Requirements(
        averages_entries=True, keeps_basis=True, needs_only_mean=True, accepts_stale=True, assumes_zero_init=False
    )
    inner: str = "fedavg"
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.7
    momentum: float = 0.9
    keep_optimizer: bool = True

    def __post_init__(self) -> None:
        require("strategy.inner", self.inner, choices=[n for n in _STRATEGIES if n != "diloco"])
        try:
            within: Strategy = _STRATEGIES.find(self.inner)(**self.settings)
        except TypeError as bad:
            raise ConfigError(f"strategy.settings={dict(self.settings)} does not fit strategy.inner={self.inner}: {bad}") from None
        object.__setattr__(self, "within", within)
        object.__setattr__(self, "requirements", within.requirements)

    def check(self, config: Config) -> None:
        """Raises ConfigError if an outer step cannot follow the inner strategy's."""
        require("strategy.lr", self.lr, gt=0)
        require("strategy.momentum", self.momentum, ge=0, lt=1)
        needs = self._within.requirements
        if not needs.keeps_basis or needs.beyond_adapter:
            why = "changes more than the adapter's values" if needs.keeps_basis else "computes new factors in every round"
            raise ConfigError(
                f"strategy.inner={self.inner} {why}, so the momentum of earlier rounds means nothing: set strategy.inner=fedavg"
            )
        self._within.check(config)

    def start(self, adapter: AdapterState) -> ServerState:
        return self._within.start(adapter)

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        plans = [dataclasses.replace(p, keep_optimizer=self.keep_optimizer) for p in plans]
        given = self._within.plan(round, plans, _inside(state))
        if not self.keep_optimizer:
            return given
        return {client: dataclasses.replace(a, stretch=_STRETCH * a.stretch) for client, a in given.items()}

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        return self._step(state, self._within.aggregate(round, _inside(state), updates))

    def aggregate_mean(self, round: int, state: ServerState, mean: Mapping[str, Tensor]) -> ServerState:
        return self._step(state, self._within.aggregate_mean(round, _inside(state), mean))

    def notes(self, round: int, before: ServerState, after: ServerState) -> list[str]:
        return self._within.notes(round, _inside(before), _inside(after))

    @property
    def _within(self) -> Strategy:
        return vars(self)["within"]

    def _step(self, before: ServerState, inner: ServerState) -> ServerState:
        """The outer step, from the state before the round and the inner strategy's state after it."""
        tensors, memory = dict[str, Tensor](), dict(inner.memory)
        for name, old in before.adapter.tensors.items():
            if torch.equal(inner.adapter[name], old):  # the round did not train it: the other factor of RoLoRA
                tensors[name] = old
                memory |= {n: t for n, t in before.memory.items() if n == _OWN + name}
                continue
            new = inner.adapter[name].double()
            delta = old.double() - new
            v = self.momentum * before.memory[_OWN + name] + delta if _OWN + name in before.memory else delta
            # w − η(Δ + μv), written so that η = 1, μ = 0 gives the inner result bit for bit
            tensors[name] = (new + (1 - self.lr) * delta - self.lr * self.momentum * v).to(old.dtype)
            memory[_OWN + name] = v
        return dataclasses.replace(inner, adapter=inner.adapter.replace(tensors), memory=memory)


def _inside(state: ServerState) -> ServerState:
    """The inner strategy's state."""
    return dataclasses.replace(state, memory={n: t for n, t in state.memory.items() if not n.startswith(_OWN)})

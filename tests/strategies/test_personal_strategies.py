"""The server halves of personalization: plans, means, what stays with the clients, and settings that cannot work."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.rounds.find_strategy import make_strategy
from fedtune.strategies.apfl import APFL
from fedtune.strategies.ditto import Ditto
from fedtune.strategies.feddat import FedDAT
from fedtune.strategies.feddpa import FedDPA
from fedtune.strategies.fedper import FedPer
from fedtune.strategies.fedrep import FedRep
from fedtune.strategies.pfedme import PFedMe
from tests.strategies.updates import plain, random_adapter, update

PLANS = [Plan(round=2, client=c, base_version=1) for c in "ab"]
PARAMS: dict[str, tuple[Strategy, dict[str, Any]]] = {
    "ditto": (Ditto(mu=0.3), {"mu": 0.3}),
    "pfedme": (PFedMe(mu=3.0, inner_steps=4, inner_lr=0.01), {"mu": 3.0, "inner_steps": 4, "inner_lr": 0.01}),
    "apfl": (APFL(alpha=0.2, alpha_lr=0.7), {"alpha": 0.2, "alpha_lr": 0.7}),
    "feddpa": (FedDPA(mix=0.2, mix_lr=0.7), {"mix": 0.2, "mix_lr": 0.7}),
    "feddat": (FedDAT(temperature=2.0, weight=0.7), {"temperature": 2.0, "weight": 0.7}),
}


@pytest.mark.parametrize("turn", PARAMS)
def test_the_plan_carries_the_turn_and_nothing_else(turn: str) -> None:
    strategy, params = PARAMS[turn]
    state = ServerState(adapter=random_adapter(0))
    assignments = strategy.plan(2, PLANS, state)
    assert [assignments[p.client].plan for p in PLANS] == [dataclasses.replace(p, turn=turn, params=params) for p in PLANS]
    assert all(a.adapter is state.adapter for a in assignments.values())


@pytest.mark.parametrize(("strategy", "expected"), [(Ditto(), 5.0), (APFL(), 5.0), (PFedMe(beta=1.0), 5.0), (PFedMe(beta=2.0), 6.0)])
def test_a_round_by_hand(strategy: Strategy, expected: float) -> None:
    after = strategy.aggregate(1, ServerState(adapter=plain(4.0)), iter([update("a", plain(2.0), 1), update("b", plain(6.0), 3)]))
    # the mean is (2 + 3·6) / 4 = 5; β = 2 goes twice as far from 4
    assert after.adapter["w"].item() == expected


@pytest.mark.parametrize("strategy", [FedDPA(), FedDAT()])
def test_the_shared_adapter_has_half_of_each_rank(strategy: Strategy) -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 4, "up": 2}, scaling={"q": 2.0, "up": 4.0})
    shapes = {"q.lora_A": (4, 5), "q.lora_B": (3, 4), "up.lora_A": (2, 3), "up.lora_B": (7, 2), "head.weight": (4, 7)}
    gen = torch.Generator().manual_seed(0)
    adapter = AdapterState({n: torch.randn(s, generator=gen) for n, s in shapes.items()}, spec)
    half = strategy.start(adapter).adapter
    assert half.spec.ranks == {"q": 2, "up": 1} and half.spec.scaling == {"q": 4.0, "up": 8.0}  # alpha is constant
    assert torch.equal(half["q.lora_A"], adapter["q.lora_A"][:2]) and torch.equal(half["head.weight"], adapter["head.weight"])
    first = 2.0 * adapter["q.lora_B"][:, :2] @ adapter["q.lora_A"][:2]
    assert torch.allclose(half.product("q"), first, atol=1e-6)


def adapter_of(*names: str, ranks: tuple[str, ...] = ()) -> AdapterState:
    return AdapterState(
        {n: torch.zeros(2) for n in names}, AdapterSpec(method="lora", ranks=dict.fromkeys(ranks, 1), scaling=dict.fromkeys(ranks, 1.0))
    )


LAYERS = [f"model.layers.{i}.q.lora_{x}" for i in (9, 10) for x in "AB"]
MODULES = ("model.layers.9.q", "model.layers.10.q")


@pytest.mark.parametrize(
    ("local", "names", "own"),
    [
        ((), [*LAYERS, "score.weight"], ["score.weight"]),
        ((), LAYERS, LAYERS[2:]),  # layer 10 comes after layer 9
        ((), ["model.embed.weight", *LAYERS, "model.norm.weight"], LAYERS[2:]),  # embeddings are no head
        (("*.lora_B",), LAYERS, LAYERS[1::2]),
    ],
)
def test_which_tensors_stay_with_the_clients(local: tuple[str, ...], names: list[str], own: list[str]) -> None:
    state = FedPer(local=local).start(adapter_of(*names, ranks=MODULES))
    assignment = FedPer(local=local).plan(1, PLANS, state)["a"]
    shared = [n for n in names if n not in own]
    assert list(assignment.plan.keep) == own and list(assignment.plan.send) == shared == list(assignment.adapter.tensors)
    assert assignment.plan.turn == "plain" and assignment.plan.train == ("*",)
    phases = FedRep(local=local, local_share=0.3).plan(1, PLANS, state)["a"].plan
    assert (phases.turn, phases.params, phases.keep) == ("fedrep", {"local_share": 0.3}, assignment.plan.keep)


@pytest.mark.parametrize(("local", "what"), [(("*.nothing",), "selects no tensor"), (("*",), "selects every tensor")])
def test_patterns_that_leave_nothing_are_refused(local: tuple[str, ...], what: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy.local=.* {what} of the adapter, .* such as 'model.layers.9.q.lora_A' and"):
        FedPer(local=local).start(adapter_of(*LAYERS, ranks=MODULES))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["strategy=pfedme", "strategy.mu=20", "strategy.inner_lr=0.1"], "inner_lr=0.1 times strategy.mu=20 is 2 or more"),
        (["strategy=feddpa", "peft.rank=5"], "strategy=feddpa gives each of two adapters half of the rank, but 5 is odd"),
        (["strategy=feddat", "peft.rank_pattern={q_proj: 3}"], "but 3 is odd: set even ranks"),
        (["strategy=feddpa", "peft=bitfit"], "strategy=feddpa does not work with peft.method=bitfit: it adds LoRA products"),
        *((["privacy=record", f"strategy={name}"], f"strategy={name} trains personal .* set privacy=user, or take") for name in PARAMS),
    ],
)
def test_settings_that_cannot_work_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_strategy(compose(["devices=none", *words])[0].config)


WRONG: list[tuple[Callable[[], None], Any, str, Any]] = [
    (lambda: test_a_round_by_hand(PFedMe(beta=2.0), 6.0), PFedMe, "aggregate_mean", APFL.aggregate_mean),
    (lambda: test_which_tensors_stay_with_the_clients((), LAYERS, LAYERS[2:]), FedPer, "_own", lambda self, adapter: LAYERS[:2]),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_server_half_is_detected(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    test, where, attribute, value = WRONG[number]
    monkeypatch.setattr(where, attribute, value)
    with pytest.raises(AssertionError):
        test()

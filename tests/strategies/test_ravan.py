"""RAVAN: the mean of scaled cores is the exact mean of the clients' weights."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.clients.turns import turn_of
from fedtune.clients.turns.ravan import RAVAN as Turn
from fedtune.config import Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.models.methods import ravan
from fedtune.strategies import _mean
from fedtune.strategies.ravan import RAVAN

SIZES = {"q.weight": (3, 5), "up.weight": (7, 2)}
SHAPES = {"q.core": (2, 2, 2), "q.core_scale": (2,), "up.core": (3, 2, 2), "up.core_scale": (3,), "head.weight": (4, 7)}
SPEC = AdapterSpec(method="ravan", basis="4")


def start(seed: int = 0) -> AdapterState:
    """A state as the server has it in the middle of a run."""
    draw = torch.Generator().manual_seed(seed)
    return AdapterState({n: torch.ones(s) if n.endswith("scale") else torch.randn(s, generator=draw) for n, s in SHAPES.items()}, SPEC)


def weights(adapter: AdapterState) -> dict[str, Tensor]:
    """The change of each weight, and the head."""
    inner = adapter.subset([n for n in adapter.tensors if n != "head.weight"])
    found = {c.name: c.edit(torch.zeros(c.shape, dtype=torch.float64), 0, c.shape[0]) for c in ravan.edits(inner, SIZES)}
    return {**found, "head.weight": adapter["head.weight"].double()}


def clients(state: ServerState, counts: Iterable[int]) -> tuple[list[Update], list[AdapterState]]:
    """Clients that move every tensor, scales too: (their updates, the adapters that they trained)."""
    counts = list(counts)
    assignments = RAVAN().plan(1, [Plan(round=1, client=f"c{i}", base_version=0) for i in range(len(counts))], state)
    sent, own = [], []
    for i, n in enumerate(counts):
        plan, draw = assignments[f"c{i}"].plan, torch.Generator().manual_seed(i + 1)
        own.append(state.adapter.replace({k: t + 0.5 * torch.randn(t.shape, generator=draw) for k, t in state.adapter.tensors.items()}))
        reply = turn_of(plan).finish(cast(Any, None), own[-1])
        assert all(t.eq(1).all() for k, t in reply.tensors.items() if k.endswith("scale"))
        sent.append(Update(client=f"c{i}", round=1, base_version=0, adapter=reply.subset(matching(reply.tensors, plan.send)), examples=n))
    return sent, own


def error(counts: list[int], seed: int = 0) -> float:
    """Largest difference between the aggregate's weights and Σ p_k of the clients' own."""
    state = RAVAN().start(start(seed))
    sent, own = clients(state, counts)
    after = weights(RAVAN().aggregate(1, state, iter(sent)).adapter)
    whole = [weights(w) for w in own]
    mean = {n: sum((c / sum(counts) * w[n] for c, w in zip(counts, whole, strict=True)), torch.zeros(())) for n in after}
    return max(float((after[n] - mean[n]).abs().max()) for n in after)


def test_scaled_cores_by_hand() -> None:
    spec = AdapterSpec(method="ravan", basis="0")
    own = [AdapterState({"q.core": torch.tensor([[[h]]]), "q.core_scale": torch.tensor([s])}, spec) for s, h in ((2.0, 3.0), (1.0, 2.0))]
    sent = [Turn().finish(cast(Any, None), x).subset(["q.core"]) for x in own]
    state = RAVAN().start(own[0].replace({"q.core": torch.zeros(1, 1, 1), "q.core_scale": torch.ones(1)}))
    updates = [Update(client=f"c{n}", round=1, base_version=0, adapter=x, examples=n) for x, n in zip(sent, (1, 3), strict=True)]
    after = RAVAN().aggregate(1, state, updates).adapter
    # by hand: (1·2·3 + 3·1·2) / 4 = 3; means of s and H apart give 1.25 · 2.25 = 2.8125
    assert after["q.core"].item() == 3.0 and after["q.core_scale"].item() == 1.0


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_weights_are_the_mean_of_the_clients_weights(counts: list[int], seed: int) -> None:
    assert error(counts, seed) < 1e-5


def test_the_check_notices_means_of_scales_and_cores_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.strategies.ravan.SENT", ("*",))
    monkeypatch.setattr(Turn, "finish", lambda self, work, trained: trained)
    monkeypatch.setattr(torch.Tensor, "eq", lambda self, other: torch.ones(()))  # `clients` expects scales of 1
    assert error([1, 3, 2]) > 0.1


def test_the_check_notices_scales_that_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Turn, "finish", lambda self, work, x: x.replace({n: torch.ones_like(t) if n.endswith("scale") else t for n, t in x.tensors.items()})
    )
    assert error([1, 3, 2]) > 0.1


def test_the_check_notices_forgotten_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _mean.Mean.add

    def unweighted(self: _mean.Mean, tensors: Mapping[str, Tensor], weight: float) -> None:
        honest(self, tensors, 1.0)

    monkeypatch.setattr(_mean.Mean, "add", unweighted)
    assert error([1, 9]) > 0.1


def test_one_client_the_same_client_twice_and_any_order() -> None:
    state = RAVAN().start(start())
    (alone,), (own,) = clients(state, [5])
    after = weights(RAVAN().aggregate(1, state, [alone]).adapter)
    assert all(torch.allclose(after[n], t, atol=1e-5) for n, t in weights(own).items())
    twice = weights(RAVAN().aggregate(1, state, [alone, alone]).adapter)
    assert all(torch.allclose(after[n], t) for n, t in twice.items())
    sent, _ = clients(state, [1, 7, 40])
    one, two = (RAVAN().aggregate(1, state, some).adapter for some in (sent, sent[::-1]))
    assert all(torch.allclose(one[n], two[n], atol=1e-6) for n in one.tensors)


def test_without_training_nothing_changes() -> None:
    state = RAVAN().start(start())
    plan = RAVAN().plan(1, [Plan(round=1, client="a", base_version=0)], state)["a"].plan
    sent = turn_of(plan).finish(cast(Any, None), state.adapter)
    assert all(torch.equal(t, state.adapter[n]) for n, t in sent.tensors.items())


def test_neither_scales_nor_bases_are_sent() -> None:
    state = RAVAN().start(start())
    assignment = RAVAN().plan(1, [Plan(round=1, client="a", base_version=0)], state)["a"]
    assert list(assignment.adapter.tensors) == ["q.core", "up.core", "head.weight"]
    assert matching(state.adapter.tensors, assignment.plan.send) == ["q.core", "up.core", "head.weight"]
    assert matching(state.adapter.tensors, assignment.plan.train) == list(SHAPES)


@pytest.mark.parametrize("method", ["lora", "fedsb", "full"])
def test_other_methods_are_refused(method: str) -> None:
    with pytest.raises(
        ConfigError, match=f"strategy=ravan averages scaled cores, which peft.method={method} does not have: set peft=ravan"
    ):
        RAVAN().check(Config(peft=PeftConfig(method=method)))
    RAVAN().check(Config(peft=PeftConfig(method="ravan")))

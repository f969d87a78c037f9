"""FFA-LoRA: with one A for all, averaging B averages the products."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.config import Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _mean
from fedtune.strategies.ffa import FFA
from tests.fakes import fake_bridge, fake_client_app, lora_state

SENT = ["q.lora_B", "up.lora_B", "head.weight"]


def weights(adapter: AdapterState) -> dict[str, Tensor]:
    """s·B·A of every module in float64."""
    s = adapter.spec.scaling
    return {m: s[m] * adapter[f"{m}.lora_B"].double() @ adapter[f"{m}.lora_A"].double() for m in adapter.spec.ranks}


def clients(state: ServerState, counts: Iterable[int]) -> list[Update]:
    """Clients with these numbers of examples; each changes all tensors that it gets."""
    counts = list(counts)
    assignments = FFA().plan(1, [Plan(round=1, client=f"c{i}", base_version=0) for i in range(len(counts))], state)
    out = []
    for i, n in enumerate(counts):
        plan, received = assignments[f"c{i}"].plan, assignments[f"c{i}"].adapter
        sent = received.subset(matching(received.tensors, plan.send))
        moved = sent.replace({k: t + lora_state(seed=i + 1)[k] for k, t in sent.tensors.items()})
        out.append(Update(client=f"c{i}", round=1, base_version=0, adapter=moved, examples=n))
    return out


def product_error(state: ServerState, updates: list[Update]) -> float:
    """Largest difference between the aggregate's products and Σ p_k of the clients' own."""
    out = weights(FFA().aggregate(1, state, iter(updates)).adapter)
    whole = [weights(state.adapter.replace({**state.adapter.tensors, **u.adapter.tensors})) for u in updates]
    total = sum(u.examples for u in updates)
    expected = {m: sum((u.examples / total * w[m] for u, w in zip(updates, whole, strict=True)), torch.zeros(())) for m in out}
    return max(float((out[m] - expected[m]).abs().max()) for m in out)


def test_b_is_averaged_under_the_common_a() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 0.5})
    state = FFA().start(AdapterState({"q.lora_A": torch.tensor([[3.0]]), "q.lora_B": torch.tensor([[0.0]])}, spec))
    updates = [
        Update(client=c, round=1, base_version=0, adapter=AdapterState({"q.lora_B": torch.tensor([[b]])}, spec), examples=n)
        for c, n, b in (("c1", 1, 1.0), ("c2", 3, 5.0))
    ]
    # by hand: B = (1*1 + 3*5) / 4 = 4, s B A = .5 * 4 * 3 = 6 = (1 * .5*1*3 + 3 * .5*5*3) / 4
    assert weights(FFA().aggregate(1, state, iter(updates)).adapter)["q"].item() == 6.0


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_product_is_the_mean_of_the_clients_products(counts: list[int], seed: int) -> None:
    state = FFA().start(lora_state(seed=seed + 100))
    assert product_error(state, clients(state, counts)) < 1e-6


def test_the_check_notices_forgotten_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    state = FFA().start(lora_state())
    honest = _mean.Mean.add

    def add_unweighted(self: _mean.Mean, tensors: Mapping[str, Tensor], weight: float) -> None:
        honest(self, tensors, 1.0)

    monkeypatch.setattr(_mean.Mean, "add", add_unweighted)
    assert product_error(state, clients(state, [1, 9])) > 0.1


def test_the_check_notices_an_a_that_moved() -> None:
    state = FFA().start(lora_state())
    drifted = [
        Update(client=f"c{i}", round=1, base_version=0, adapter=lora_state(seed=i), examples=n) for i, n in enumerate((1, 9), start=1)
    ]  # as in FedAvg, A and B are both the client's own
    assert product_error(state, drifted) > 0.1


def test_factor_a_is_never_sent_and_never_changes() -> None:
    state = FFA().start(lora_state())
    assignments = FFA().plan(1, [Plan(round=1, client=c, base_version=0) for c in "ab"], state)
    for assignment in assignments.values():
        assert list(assignment.adapter.tensors) == SENT  # tensors that the server sends
        assert matching(assignment.adapter.tensors, assignment.plan.send) == SENT  # tensors that the client sends
        assert matching(state.adapter.tensors, assignment.plan.train) == SENT
    assert assignments["a"].adapter is assignments["b"].adapter  # encoded once
    after = FFA().aggregate(1, state, iter(clients(state, [2, 5]))).adapter
    assert list(after.tensors) == list(state.adapter.tensors)
    assert all(torch.equal(after[f"{m}.lora_A"], state.adapter[f"{m}.lora_A"]) for m in ("q", "up"))


def test_a_square_module_costs_half_the_bytes() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 3}, scaling={"q": 1.0})
    state = FFA().start(AdapterState({"q.lora_A": torch.zeros(3, 11), "q.lora_B": torch.zeros(11, 3)}, spec))
    assignments = FFA().plan(1, [Plan(round=1, client="a", base_version=0)], state)
    assert assignments["a"].adapter.nbytes * 2 == state.adapter.nbytes


def test_two_rounds_over_the_wire_by_hand(tmp_path: Path) -> None:
    start = lora_state(fill=0.0).replace({n: t + n.endswith("lora_A") for n, t in lora_state(fill=0.0).tensors.items()})
    bridge, observer = fake_bridge(
        tmp_path / "run",
        fake_client_app({"a": 1, "b": 3}),
        2,
        Config(rounds=2, clients_per_round=2),
        strategy=FFA(),
        initial=start,
    )
    state = bridge.loop()
    assert [r["dropped"] for r in observer.records[1:]] == [{}, {}]
    # each client adds its n to the received tensors: (1*1 + 3*3) / 4 = 2.5 a round
    assert all(bool((state.adapter[n] == 5.0).all()) for n in SENT) and bool((state.adapter["q.lora_A"] == 1.0).all())


@pytest.mark.parametrize("method", ["dora", "ia3", "prompt", "full"])
def test_other_adapters_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy=ffa does not work with peft.method={method}"):
        FFA().check(Config(peft=PeftConfig(method=method)))


def test_lora_and_rslora_are_accepted() -> None:
    for method in ("lora", "rslora"):
        FFA().check(Config(peft=PeftConfig(method=method)))

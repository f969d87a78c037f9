"""HierFAVG: two-level means by hand, equal to the flat mean where the paper says so."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import ServerState
from fedtune.strategies import hierfavg
from fedtune.strategies._mean import Mean
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.hierfavg import HierFAVG
from tests.strategies.updates import close, plain, random_adapter, reload, update

TWO = HierFAVG(edges=2, cloud_every=2)
CLIENTS = [f"c{i}" for i in range(8)]
LEFT, RIGHT = ([c for c in CLIENTS if TWO.edge_of(c) == e] for e in (0, 1))


def sent(state: ServerState, clients: Sequence[str]) -> list[AdapterState]:
    assignments = TWO.plan(1, [Plan(round=1, client=c, base_version=0) for c in clients], state)
    return [assignments[c].adapter for c in clients]


def value(adapter: AdapterState) -> float:
    return adapter["w"].item()


def check_two_rounds_by_hand() -> None:
    a, b, c = LEFT[0], LEFT[1], RIGHT[0]
    one = TWO.aggregate(1, TWO.start(plain(0.0)), iter([update(a, plain(1.0), 1), update(b, plain(5.0), 3), update(c, plain(8.0), 4)]))
    # the left edge: (1 + 3·5) / 4 = 4 with 4 examples; the right edge: 8 with 4. As seen from the cloud: 6
    assert [value(x) for x in sent(one, [a, c])] == [4.0, 8.0] and value(one.adapter) == 6.0
    two = TWO.aggregate(2, one, iter([update(a, plain(2.0), 12)]))
    # the left edge: 2, now with 4 + 12 = 16 examples; the cloud: (16·2 + 4·8) / 20 = 3.2 for all
    assert [value(x) for x in sent(two, [a, c])] == pytest.approx([3.2, 3.2]) and value(two.adapter) == pytest.approx(3.2)
    three = TWO.aggregate(3, two, iter([update(c, plain(7.0), 1)]))
    # the right edge starts anew with one example; the left edge still has the cloud's adapter
    assert [value(x) for x in sent(three, [a, c])] == pytest.approx([3.2, 7.0]) and value(three.adapter) == 7.0


def test_two_rounds_by_hand() -> None:
    assert len(LEFT) >= 2 and RIGHT
    check_two_rounds_by_hand()


def some(seed: int) -> list[Update]:
    return [update(c, random_adapter(seed + i), 1 + i * i) for i, c in enumerate(CLIENTS)]


def test_edges_and_cloud_in_each_round_are_the_flat_mean() -> None:
    flat = FedAvg().aggregate(1, ServerState(adapter=random_adapter(99)), iter(some(0))).adapter
    for edges in (1, 2, 5):
        strategy = HierFAVG(edges=edges, cloud_every=1)
        assert close(strategy.aggregate(1, strategy.start(random_adapter(99)), iter(some(0))).adapter, flat, 1e-6)


def test_the_memory_survives_a_checkpoint(tmp_path: Path) -> None:
    one = TWO.aggregate(1, TWO.start(random_adapter(99)), iter(some(0)))
    back = dataclasses.replace(one, memory=reload(one.memory, tmp_path))
    assert close(TWO.aggregate(2, one, iter(some(20)[:3])).adapter, TWO.aggregate(2, back, iter(some(20)[:3])).adapter, 0.0)


def test_edges_of_equal_weight_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Even(Mean):
        def add(self, tensors, weight):  # type: ignore[no-untyped-def]
            super().add(tensors, 1.0)

    monkeypatch.setattr(hierfavg, "Mean", Even)
    with pytest.raises(AssertionError):
        check_two_rounds_by_hand()


def test_edges_are_spread_over_the_clients() -> None:
    found = torch.bincount(torch.tensor([HierFAVG(edges=4).edge_of(f"client-{i}") for i in range(400)]))
    assert len(found) == 4 and found.min() > 60

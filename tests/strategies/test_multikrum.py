"""MultiKrum: the weighted mean of the clients that are closest to the others."""

import itertools

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _flower
from fedtune.strategies import multikrum as module
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.multikrum import MultiKrum
from tests.strategies.updates import close, flower_result, plain, random_adapter, update, with_other_factors


def line() -> list:
    return [update(c, plain(x), n) for c, x, n in (("a", 0.0, 1), ("b", 1.0, 1), ("c", 2.5, 3), ("d", 4.5, 1), ("e", 100.0, 90))]


def test_the_result_by_hand() -> None:
    # f = 1, n = 5: the 2 closest. a: 7.25; b: 3.25; c: 6.25; d: 16.25; e: far. The best two are b and c: (1·1 + 3·2.5) / 4
    out = MultiKrum(malicious=1, select=2).aggregate(1, ServerState(adapter=plain(0.0)), iter(line()))
    assert out.adapter["w"].item() == 2.125


def test_plain_tensors_are_aggregated_as_flower_does() -> None:
    def theirs(values: list[list[float]]) -> torch.Tensor:
        replies = [_flower.reply({"w": torch.tensor(v)}, i + 1) for i, v in enumerate(values)]
        out = flower_result(flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3), replies, 1)
        return out["w"]

    for seed in range(5):
        values = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).tolist()
        updates = [update(f"c{i}", plain(*v), i + 1) for i, v in enumerate(values)]
        out = MultiKrum().aggregate(1, ServerState(adapter=plain(*[0.0] * 6)), iter(updates))
        assert torch.allclose(out.adapter["w"], theirs(values), atol=1e-6)


def test_the_factors_of_the_selected_are_averaged_in_any_order_of_the_clients() -> None:
    state, updates = ServerState(adapter=random_adapter(0)), [update(f"c{i}", random_adapter(i + 1, 0.1), i + 1) for i in range(5)]
    outs = [MultiKrum(select=2).aggregate(1, state, iter(p)).adapter for p in itertools.islice(itertools.permutations(updates), 0, 120, 7)]
    assert all(close(o, outs[0], atol=0) for o in outs)
    pairs = [FedAvg().aggregate(1, state, iter(p)).adapter for p in itertools.combinations(updates, 2)]
    assert sum(close(outs[0], p, atol=0) for p in pairs) == 1


def selected_clients(adapters: list[AdapterState], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The selected clients: the positions that the strategy gets from `krum`."""
    seen, own = [], module.krum
    monkeypatch.setattr(module, "krum", lambda *args, **kwargs: seen.append(own(*args, **kwargs)) or seen[-1])
    MultiKrum().aggregate(1, ServerState(adapter=random_adapter(0)), [update(f"c{i}", a) for i, a in enumerate(adapters)])
    monkeypatch.undo()
    return seen[0]


def test_the_selection_depends_only_on_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [random_adapter(i + 1, 0.3) for i in range(7)]
    expected = selected_clients(adapters, monkeypatch)
    for seed in range(5):
        assert selected_clients([with_other_factors(a, seed=10 * seed + i) for i, a in enumerate(adapters)], monkeypatch) == expected


def test_a_config_without_the_guarantee_is_refused() -> None:
    with pytest.raises(ConfigError, match="malicious \\+ select \\+ 2 = 6 good updates .*: set min_clients=6"):
        MultiKrum().check(Config(min_clients=5))
    with pytest.raises(ConfigError, match="strategy.select=0 is out of range"):
        MultiKrum(select=0).check(Config())
    # with a small `select` this bound is the larger one
    with pytest.raises(ConfigError, match="2·malicious \\+ 3 = 9 good updates .*: set min_clients=9"):
        MultiKrum(malicious=3, select=1).check(Config(min_clients=8))
    MultiKrum().check(Config(min_clients=6))


def test_averaging_all_clients_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "krum", lambda apart, malicious, select: list(range(len(apart))))
    out = MultiKrum(malicious=1, select=2).aggregate(1, ServerState(adapter=plain(0.0)), iter(line()))
    assert out.adapter["w"].item() > 90

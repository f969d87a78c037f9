"""Bulyan on numbers that can be checked by hand, and against Flower's unmodified class."""

import itertools

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _flower
from fedtune.strategies import bulyan as module
from fedtune.strategies.bulyan import Bulyan
from tests.strategies.updates import close, flower_result, plain, random_adapter, update, with_other_factors

LINE = (0.0, 1.0, 2.5, 4.5, 7.0, 10.0, 1000.0)


def test_the_result_by_hand() -> None:
    updates = [update(f"c{i}", plain(x), examples=i + 1) for i, x in enumerate(LINE)]
    # f = 1, n = 7: scores over the 4 closest, by hand 0: 1 + 6.25 + 20.25 + 49 = 76.5; 1: 1 + 2.25 + 12.25 + 36 = 51.5;
    # 2.5: 2.25 + 4 + 6.25 + 20.25 = 32.75; 4.5: 4 + 6.25 + 12.25 + 20.25 = 42.75; 7: 6.25 + 9 + 20.25 + 36 = 71.5; 10: far
    # the best 5 are 0, 1, 2.5, 4.5, 7; their median is 2.5; the 3 closest to it are 1, 2.5, 4.5
    out = Bulyan(malicious=1).aggregate(1, ServerState(adapter=plain(0.0)), iter(updates))
    assert out.adapter["w"].item() == pytest.approx(8.0 / 3.0)


def test_plain_tensors_are_aggregated_as_flower_does() -> None:
    for seed in range(5):
        values = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed)).tolist()
        theirs = flower_result(flower.Bulyan(num_malicious_nodes=1), [_flower.reply({"w": torch.tensor(v)}, 1) for v in values])
        updates = [update(f"c{i}", plain(*v), i + 1) for i, v in enumerate(values)]
        out = Bulyan().aggregate(1, ServerState(adapter=plain(*[0.0] * 6)), iter(updates))
        assert torch.allclose(out.adapter["w"], theirs["w"], atol=1e-6)


def test_too_few_updates_leave_the_state() -> None:
    state = ServerState(adapter=random_adapter(0), shifts=(random_adapter(5),))
    out = Bulyan().aggregate(1, state, [update(f"c{i}", random_adapter(i + 1)) for i in range(6)])
    assert close(out.adapter, state.adapter, atol=0) and out.shifts == state.shifts


def test_order_does_not_matter() -> None:
    state, updates = ServerState(adapter=random_adapter(0)), [update(f"c{i}", random_adapter(i + 1)) for i in range(7)]
    outs = [Bulyan().aggregate(1, state, iter(p)).adapter for p in itertools.islice(itertools.permutations(updates), 0, 5040, 501)]
    assert all(close(o, outs[0], atol=0) for o in outs)


def test_the_selection_depends_only_on_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, own = [], module.krum
    monkeypatch.setattr(module, "krum", lambda *args, **kwargs: seen.append(own(*args, **kwargs)) or seen[-1])
    adapters = [random_adapter(i + 1, 0.3) for i in range(8)]
    for seed in range(4):
        turned = [with_other_factors(a, 10 * seed + i) if seed else a for i, a in enumerate(adapters)]
        Bulyan().aggregate(1, ServerState(adapter=random_adapter(0)), [update(f"c{i}", a) for i, a in enumerate(turned)])
    assert all(s == seen[0] for s in seen) and len(seen) == 4 and len(seen[0]) == 6


def test_selecting_all_clients_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "krum", lambda apart, malicious, select: list(range(len(apart))))
    out = Bulyan().aggregate(1, ServerState(adapter=plain(0.0)), [update(f"c{i}", plain(x)) for i, x in enumerate(LINE)])
    assert out.adapter["w"].item() == pytest.approx((2.5 + 4.5 + 7.0) / 3)  # near the median of all, 4.5


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match="strategy=bulyan needs 4·malicious \\+ 3 = 7 good updates .*: set min_clients=7"):
        Bulyan().check(Config())
    Bulyan().check(Config(min_clients=7))

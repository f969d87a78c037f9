"""Krum: the result is one client, selected by the effects of the adapters."""

import itertools

import pytest

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError, UpdateMismatch
from fedtune.strategies import krum as module
from fedtune.strategies.krum import Krum
from tests.strategies.updates import close, plain, random_adapter, update, with_other_factors


def test_the_result_by_hand() -> None:
    updates = [update(c, plain(x)) for c, x in (("a", 0.0), ("b", 1.0), ("c", 2.5), ("d", 4.5), ("e", 100.0))]
    # f = 1, n = 5: the 2 closest. a: 1 + 6.25; b: 1 + 2.25; c: 2.25 + 4; d: 4 + 12.25; e: far
    out = Krum(malicious=1).aggregate(1, ServerState(adapter=plain(0.0)), iter(updates))
    assert out.adapter["w"].item() == 1.0


def test_krum_returns_one_client_s_tensors_bit_for_bit_in_any_order() -> None:
    state, updates = ServerState(adapter=random_adapter(0)), [update(f"c{i}", random_adapter(i + 1, 0.1), i + 1) for i in range(4)]
    outs = [Krum().aggregate(1, state, iter(p)).adapter for p in itertools.permutations(updates)]
    assert any(close(outs[0], u.adapter, atol=0) for u in updates)
    assert all(close(o, outs[0], atol=0) for o in outs)


def planted_updates() -> list:
    """Six honest clients around one model, each with its own factors, and a malicious one with a distant product and near factors."""
    truth = random_adapter(0)
    honest = [truth.replace({n: t + 0.01 * random_adapter(i)[n] for n, t in truth.tensors.items()}) for i in range(1, 7)]
    far = truth.replace({n: t + (2.0 if n.endswith("lora_B") else 0.0) for n, t in truth.tensors.items()})
    return [*(update(f"c{i}", with_other_factors(h, seed=i, size=10.0)) for i, h in enumerate(honest)), update("liar", far)]


def test_a_malicious_client_is_not_chosen_with_any_factors() -> None:
    out = Krum().aggregate(1, ServerState(adapter=random_adapter(0)), iter(planted_updates()))
    assert not close(out.adapter, planted_updates()[-1].adapter)


def test_distances_between_factors_would_choose_the_malicious_client(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module.distances
    monkeypatch.setattr(
        module, "distances", lambda adapters, origin: own([a.replace(ranks={}) for a in adapters], origin.replace(ranks={}))
    )
    out = Krum().aggregate(1, ServerState(adapter=random_adapter(0)), iter(planted_updates()))
    assert close(out.adapter, planted_updates()[-1].adapter, atol=0)


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match="strategy=krum needs 2·malicious \\+ 3 = 5 good updates .*: set min_clients=5"):
        Krum().check(Config())
    with pytest.raises(ConfigError, match="clients_per_round=10 and min_clients=1: set clients_per_round=13 min_clients=13"):
        Krum(malicious=5).check(Config())
    with pytest.raises(ConfigError, match="strategy.malicious=-1 is out of range"):
        Krum(malicious=-1).check(Config())
    Krum().check(Config(min_clients=5))


def test_mixed_ranks_are_refused() -> None:
    short = random_adapter(1).replace({**random_adapter(1).tensors, "up.lora_B": random_adapter(1)["up.lora_B"][:, :0]})
    with pytest.raises(UpdateMismatch, match="give all clients the same rank"):
        Krum().aggregate(1, ServerState(adapter=random_adapter(0)), [update("a", short)])

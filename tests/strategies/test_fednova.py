"""FedNova on numbers that can be checked by hand, and its minimum."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import ClientConfig, Config
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import ConfigError, UpdateError
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fednova import FedNova
from tests.strategies.updates import close, plain, random_adapter, update


def test_the_result_by_hand() -> None:
    updates = [update("a", plain(-1.0), 1, lr_sum=0.1), update("b", plain(4.0), 3, lr_sum=0.4)]
    # d_a = (0 + 1) / .1 = 10, d_b = −4 / .4 = −10; Σ p d = (10 − 30) / 4 = −5; Σ p‖a‖ = (.1 + 3·.4) / 4 = .325; w = 0 + 1.625
    out = FedNova().aggregate(1, ServerState(adapter=plain(0.0)), iter(updates))
    assert out.adapter["w"].item() == pytest.approx(1.625)  # FedAvg: (−1 + 12) / 4 = 2.75


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_equal_steps_are_fedavg(counts: list[int]) -> None:
    state, updates = (
        ServerState(adapter=random_adapter(0)),
        [update(f"c{i}", random_adapter(i + 1), n, lr_sum=0.37) for i, n in enumerate(counts)],
    )
    assert close(FedNova().aggregate(1, state, iter(updates)).adapter, FedAvg().aggregate(1, state, iter(updates)).adapter, atol=1e-6)


def test_order_and_the_scale_of_the_rates_do_not_matter() -> None:
    state = ServerState(adapter=random_adapter(0))
    outs = []
    for scale in (1.0, 12.0):
        updates = [update(f"c{i}", random_adapter(i + 1), n, lr_sum=scale * (i + 1)) for i, n in enumerate((1, 7, 40))]
        outs += [FedNova().aggregate(1, state, iter(p)).adapter for p in itertools.permutations(updates)]
    assert all(close(o, outs[0]) for o in outs) and len(outs) == 12


def walk(method: Strategy) -> float:
    """Two clients with F_k(w) = ½(w − target)² and as many examples, one at 2 steps a round, the other at 10."""
    state = ServerState(adapter=plain(5.0))
    for round in range(1, 300):
        updates = []
        for client, target, steps in (("a", 0.0, 2), ("b", 10.0, 10)):
            w = state.adapter["w"]
            for _ in range(steps):
                w = w - 0.01 * (w - target)
            updates.append(update(client, plain(w.item()), lr_sum=0.01 * steps))
        state = method.aggregate(round, state, updates)
    return state.adapter["w"].item()


def test_fednova_is_fair_to_slow_clients_unlike_fedavg() -> None:
    assert walk(FedNova()) == pytest.approx(5.0, abs=0.3)  # the minimum of the mean loss
    assert walk(FedAvg()) > 8.0  # about 10·10 / 12: dropping the normalization fails the check above


def test_a_turn_at_rate_zero_does_not_divide_by_zero() -> None:
    updates = [update("a", plain(0.0), lr_sum=0.0), update("b", plain(1.0), lr_sum=0.5)]
    assert torch.isfinite(FedNova().aggregate(1, ServerState(adapter=plain(0.0)), iter(updates)).adapter["w"]).all()


def test_other_optimizers_are_refused_unless_heuristic() -> None:
    for client in (ClientConfig(), ClientConfig(optimizer="sgd"), ClientConfig(clip_norm=None)):
        with pytest.raises(ConfigError, match="set client.optimizer=sgd client.clip_norm=null .* or strategy.heuristic=true"):
            FedNova().check(Config(client=client))
        FedNova(heuristic=True).check(Config(client=client))
    FedNova().check(Config(client=ClientConfig(optimizer="sgd", clip_norm=None)))
    with pytest.raises(UpdateError, match="client old sent lr_sum=None"):
        FedNova().aggregate(1, ServerState(adapter=plain(0.0)), [update("old", plain(1.0))])

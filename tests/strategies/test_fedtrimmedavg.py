"""FedTrimmedAvg on numbers that can be checked by hand."""

from collections.abc import Callable
from random import Random

import pytest
import torch
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import fedtrimmedavg as module
from fedtune.strategies.fedtrimmedavg import FedTrimmedAvg
from tests.strategies.updates import plain, random_adapter, update

START = ServerState(adapter=plain(0.0))


def trimmed_mean(beta: float, *values: float) -> float:
    updates = [update(f"c{i}", plain(v), examples=i + 1) for i, v in enumerate(values)]
    return FedTrimmedAvg(beta=beta).aggregate(1, START, iter(updates)).adapter["w"].item()


def check_by_hand() -> None:
    assert trimmed_mean(0.2, 1.0, -500.0, 6.0, 2.0, 900.0) == 3.0  # (1 + 6 + 2) / 3
    assert trimmed_mean(0.4, 1.0, -500.0, 6.0, 2.0, 900.0) == 2.0  # the median
    assert trimmed_mean(0.0, 1.0, 2.0, 6.0) == 3.0
    assert trimmed_mean(0.2, 1.0, 2.0, 6.0, 3.0) == 3.0  # ⌊.2·4⌋ = 0: nothing is cut


def test_by_hand_for_any_number_of_examples() -> None:
    check_by_hand()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda beta: flower.FedAvg(), id="nothing cut"),
        pytest.param(lambda beta: flower.FedMedian(), id="all but the median cut"),
        pytest.param(lambda beta: THEIRS(beta=beta / 2), id="beta over both ends"),
    ],
)
def test_another_rule_is_caught(wrong: Callable[[float], flower.FedAvg], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.flower, "FedTrimmedAvg", wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


THEIRS = flower.FedTrimmedAvg


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=9), st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[float], random: Random) -> None:
    assert trimmed_mean(0.2, *values) == pytest.approx(trimmed_mean(0.2, *random.sample(values, len(values))), abs=1e-4)


def test_any_malicious_minority_keeps_the_result_within_the_honest_values() -> None:
    state, honest = ServerState(adapter=random_adapter(0)), [update(f"c{i}", random_adapter(i + 1)) for i in range(4)]
    out = FedTrimmedAvg().aggregate(1, state, [*honest, update("x", random_adapter(8, 1e6))]).adapter
    for name, t in out.tensors.items():
        seen = torch.stack([u.adapter[name] for u in honest])
        assert (t >= seen.min(0).values).all() and (t <= seen.max(0).values).all()
    untrimmed = FedTrimmedAvg(beta=0.0).aggregate(1, state, [*honest, update("x", random_adapter(8, 1e6))]).adapter
    assert untrimmed["head.weight"].abs().max() > 1e4  # without trimming the same check fails


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="strategy.beta=0.5 is out of range"):
        FedTrimmedAvg(beta=0.5).check(Config())
    with pytest.raises(ConfigError, match="clients_per_round=4 and min_clients=1: set clients_per_round=5 min_clients=5"):
        FedTrimmedAvg().check(Config(clients_per_round=4))
    with pytest.raises(ConfigError, match="1/beta = 5 good updates in every round that counts, but min_clients=1: set min_clients=5"):
        FedTrimmedAvg().check(Config())
    FedTrimmedAvg().check(Config(min_clients=5))
    FedTrimmedAvg(beta=0.0).check(Config())

"""FedAvgM on numbers that can be checked by hand, and against Flower's unmodified class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _flower, _mean
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedavgm import FedAvgM
from tests.strategies.updates import close, flower_result, plain, random_adapter, reload, update


def check_by_hand() -> None:
    method = FedAvgM(lr=1.0, momentum=0.5)
    one = method.aggregate(1, method.start(plain(0.0)), [update("a", plain(1.0), 1), update("b", plain(5.0), 3)])
    # w̄ = (1 + 3·5) / 4 = 4, v = 0 − 4 = −4, w = 0 + 4
    assert one.adapter["w"].item() == 4.0 and one.memory["momentum/w"].item() == -4.0
    two = method.aggregate(2, one, [update("a", plain(6.0))])
    # v = .5·(−4) + (4 − 6) = −4, w = 4 + 4 = 8
    assert two.adapter["w"].item() == 8.0 and two.memory["momentum/w"].item() == -4.0


def test_two_rounds_by_hand() -> None:
    check_by_hand()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("remembered", lambda memory, what, names: None, id="momentum forgotten"),
        pytest.param("remembered", lambda *args: {n: -v for n, v in (RIGHT(*args) or {}).items()}, id="sign turned"),
    ],
)
def test_a_wrong_formula_is_caught(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flower, name, wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


def test_missing_weights_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mean.Mean, "add", lambda self, tensors, weight: ADD(self, tensors, 1.0))
    with pytest.raises(AssertionError):
        check_by_hand()


RIGHT, ADD = _flower.remembered, _mean.Mean.add


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.9), (0.3, 0.5), (0.7, 0.0)])
def test_three_rounds_equal_flower_s(lr: float, momentum: float) -> None:
    method, state = FedAvgM(lr=lr, momentum=momentum), ServerState(adapter=random_adapter(0))
    theirs = flower.FedAvgM(server_learning_rate=lr, server_momentum=momentum)
    theirs.current_arrays = _flower.arrays(state.adapter.tensors)
    for round in (1, 2, 3):
        updates = [update(f"c{i}", random_adapter(10 * round + i), n) for i, n in enumerate((1, 7, 40))]
        state = method.aggregate(round, state, iter(updates))
        expected = flower_result(theirs, [_flower.reply(u.adapter.tensors, u.examples) for u in updates], round)
        assert all(torch.allclose(state.adapter[n], expected[n], atol=1e-5) for n in state.adapter.tensors)


def test_without_momentum_at_rate_one_the_result_is_fedavg() -> None:
    updates, state = [update("a", random_adapter(1), 2), update("b", random_adapter(2), 5)], ServerState(adapter=random_adapter(0))
    out = FedAvgM(lr=1.0, momentum=0.0).aggregate(1, state, iter(updates))
    assert close(out.adapter, FedAvg().aggregate(1, state, iter(updates)).adapter, atol=0) and not out.memory


def test_a_restart_continues_bit_for_bit(tmp_path: Path) -> None:
    method = FedAvgM()
    one = method.aggregate(
        1, ServerState(adapter=random_adapter(0)), [update("a", random_adapter(1), 3), update("b", random_adapter(2), 4)]
    )
    again = ServerState(adapter=one.adapter, memory=reload(one.memory, tmp_path))
    outs = [method.aggregate(2, s, [update("a", random_adapter(3))]) for s in (one, again)]
    assert close(outs[0].adapter, outs[1].adapter, atol=0)
    # the memory has an effect: without it the second round differs
    assert not close(
        outs[0].adapter, method.aggregate(2, ServerState(adapter=one.adapter), [update("a", random_adapter(3))]).adapter, atol=1e-2
    )


@pytest.mark.parametrize("bad", [FedAvgM(lr=0.0), FedAvgM(momentum=1.0), FedAvgM(momentum=float("nan"))])
def test_settings_out_of_bounds_are_refused(bad: FedAvgM) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.(lr|momentum)=.* is out of range"):
        bad.check(Config())

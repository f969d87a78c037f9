"""FedAdagrad on numbers that can be checked by hand, and against Flower's unmodified class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _flower, _mean
from fedtune.strategies import fedadagrad as module
from fedtune.strategies.fedadagrad import FedAdagrad
from tests.strategies.updates import close, flower_result, plain, random_adapter, reload, update

METHOD = FedAdagrad(lr=0.1, tau=1e-3)


def check_by_hand() -> None:
    one = METHOD.aggregate(1, METHOD.start(plain(0.0)), [update("a", plain(1.0), 1), update("b", plain(5.0), 3)])
    # Δ = 4, v = 16, w = .1·4 / (4 + .001)
    assert one.adapter["w"].item() == pytest.approx(0.1 * 4 / 4.001, rel=1e-6) and set(one.memory) == {"t", "v/w"}
    two = METHOD.aggregate(2, one, [update("a", plain(one.adapter["w"].item() + 3.0))])
    # Δ = 3, v = 16 + 9 = 25, step .1·3 / (5 + .001); a v that forgets, as Adam's, would be 9 and the step .1
    assert (two.adapter["w"] - one.adapter["w"]).item() == pytest.approx(0.1 * 3 / 5.001, rel=1e-5)


def test_two_rounds_by_hand() -> None:
    check_by_hand()


ADD = _mean.Mean.add


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        pytest.param(_flower, "remembered", lambda memory, what, names: None, id="v forgotten"),
        pytest.param(module.flower, "FedAdagrad", lambda eta, tau: flower.FedAdam(eta=eta, beta_1=0.0, tau=tau), id="Adam's v"),
        pytest.param(_mean.Mean, "add", lambda self, tensors, weight: ADD(self, tensors, 1.0), id="weights dropped"),
    ],
)
def test_a_wrong_formula_is_caught(where: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


def test_three_rounds_equal_flower_s() -> None:
    state, theirs = ServerState(adapter=random_adapter(0)), flower.FedAdagrad(eta=0.1, tau=1e-3)
    for round in (1, 2, 3):
        updates = [update(f"c{i}", random_adapter(10 * round + i), n) for i, n in enumerate((1, 7, 40))]
        theirs.current_arrays = _flower.numpy(state.adapter.tensors)
        state = METHOD.aggregate(round, state, iter(updates))
        expected = flower_result(theirs, [_flower.reply(u.adapter.tensors, u.examples) for u in updates], round)
        assert all(torch.allclose(state.adapter[n], expected[n], atol=1e-6) for n in state.adapter.tensors)


def test_a_restart_continues_bit_for_bit(tmp_path: Path) -> None:
    one = METHOD.aggregate(
        1, ServerState(adapter=random_adapter(0)), [update("a", random_adapter(1), 3), update("b", random_adapter(2), 4)]
    )
    again = ServerState(adapter=one.adapter, memory=reload(one.memory, tmp_path))
    outs = [METHOD.aggregate(2, s, [update("a", random_adapter(3))]).adapter for s in (one, again)]
    assert close(outs[0], outs[1], atol=0)
    assert not close(outs[0], METHOD.aggregate(2, ServerState(adapter=one.adapter), [update("a", random_adapter(3))]).adapter, atol=1e-2)


@pytest.mark.parametrize("bad", [FedAdagrad(lr=0.0), FedAdagrad(tau=-1.0)])
def test_settings_out_of_bounds_are_refused(bad: FedAdagrad) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.\w+=.* is out of range"):
        bad.check(Config())

"""q-FedAvg on numbers that can be checked by hand, and against Flower's unmodified class."""

import dataclasses
from typing import Any

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError, UpdateError
from fedtune.strategies import _flower
from fedtune.strategies import qfedavg as module
from fedtune.strategies.qfedavg import QFedAvg
from tests.strategies.updates import close, flower_result, plain, random_adapter, update

START = ServerState(adapter=plain(0.0))


def check_by_hand() -> None:
    updates = [update("a", plain(1.0), 50, metrics={"start_loss": 4.0}), update("b", plain(-2.0), 1, metrics={"start_loss": 1.0})]
    # q = 1, L = 2: L(w − w_k) = −2 and 4; Σ F·L(w − w_k) = 4·(−2) + 1·4 = −4
    # Σ (q·‖·‖² + L·F) = (4 + 2·4) + (16 + 2·1) = 30; w = 0 + 4/30. The examples do not count
    out = QFedAvg(q=1.0, lr=0.5).aggregate(1, START, iter(updates))
    assert out.adapter["w"].item() == pytest.approx(4 / 30)
    updates = [update("a", plain(1.0), metrics={"start_loss": 4.0, "train_loss": 1.0})]
    # F = 4, the loss before training: (4·2) / (4 + 8); with F = 1, that of the training, it would be 2 / (4 + 2)
    assert QFedAvg(q=1.0, lr=0.5).aggregate(1, START, iter(updates)).adapter["w"].item() == pytest.approx(2 / 3)


def test_the_result_by_hand() -> None:
    check_by_hand()


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        pytest.param(_flower, "measured", lambda update, values, name: values.get("train_loss", 1.0), id="the loss after training"),
        pytest.param(module.flower, "QFedAvg", lambda q, **rest: THEIRS(q=0.0, **rest), id="q dropped"),
        pytest.param(
            module.flower,
            "QFedAvg",
            lambda client_learning_rate, **rest: THEIRS(client_learning_rate=1 / client_learning_rate, **rest),
            id="L for 1 / L",
        ),
    ],
)
def test_a_wrong_formula_is_caught(where: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


THEIRS = flower.QFedAvg


def test_q_0_is_the_plain_mean() -> None:
    updates = [update(f"c{i}", random_adapter(i + 1), 10**i, metrics={"start_loss": float(i + 1)}) for i in range(3)]
    out = QFedAvg(q=0.0, lr=0.01).aggregate(1, ServerState(adapter=random_adapter(0)), iter(updates)).adapter
    assert all(torch.allclose(t, torch.stack([u.adapter[n] for u in updates]).mean(0), atol=1e-5) for n, t in out.tensors.items())


def test_a_larger_q_gives_more_weight_to_a_higher_loss() -> None:
    updates = [update("well", plain(1.0), metrics={"start_loss": 0.5}), update("badly", plain(-1.0), metrics={"start_loss": 2.0})]
    ends = [QFedAvg(q=q, lr=1.0).aggregate(1, START, iter(updates)).adapter["w"].item() for q in (0.0, 0.1, 1.0)]
    assert ends[0] == pytest.approx(0.0, abs=1e-7) and 0 > ends[1] > ends[2]


def test_the_result_equals_flower_s() -> None:
    state, theirs = ServerState(adapter=random_adapter(0)), flower.QFedAvg(client_learning_rate=0.3, q=0.7, train_loss_key="F")
    updates = [update(f"c{i}", random_adapter(i + 1), i + 1, metrics={"start_loss": 0.5 + i}) for i in range(4)]
    theirs.current_arrays = _flower.arrays(state.adapter.tensors)
    expected = flower_result(theirs, [_flower.reply(u.adapter.tensors, 1, F=u.metrics["start_loss"]) for u in updates])
    out = QFedAvg(q=0.7, lr=0.3).aggregate(1, state, iter(reversed(updates))).adapter
    assert all(torch.allclose(t, expected[n].float()) for n, t in out.tensors.items())
    assert close(state.adapter, random_adapter(0), atol=0) and close(
        updates[0].adapter, random_adapter(1), atol=0
    )  # copies, because Flower's class changes its inputs


def test_the_start_loss_is_requested_once() -> None:
    plan = Plan(round=1, client="a", base_version=0)
    for given in (plan, dataclasses.replace(plan, measure=("start_loss",))):
        assert QFedAvg().plan(1, [given], START)["a"].plan == dataclasses.replace(plan, measure=("start_loss",))


def test_a_client_without_the_start_loss_is_named() -> None:
    with pytest.raises(UpdateError, match="client old sent start_loss=None"):
        QFedAvg().aggregate(1, START, [update("old", plain(1.0))])


@pytest.mark.parametrize("bad", [QFedAvg(q=-0.1), QFedAvg(lr=0.0)])
def test_settings_out_of_bounds_are_refused(bad: QFedAvg) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.\w+=.* is out of range"):
        bad.check(Config())

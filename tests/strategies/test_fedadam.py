"""FedAdam on numbers that can be checked by hand, and against Flower's unmodified class."""

from pathlib import Path

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _flower
from fedtune.strategies.fedadam import FedAdam
from tests.strategies.updates import close, flower_result, plain, random_adapter, reload, update

METHOD = FedAdam(lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)


def test_two_rounds_by_hand() -> None:
    one = METHOD.aggregate(7, METHOD.start(plain(0.0)), [update("a", plain(1.0), 1), update("b", plain(5.0), 3)])
    # Δ = 4; m = .1·4 = .4; v = .01·16 = .16; η₁ = .1·√.01/.1 = .1 in any round of the run; w = .1·.4 / (.4 + .001)
    assert one.memory["m/w"].item() == pytest.approx(0.4) and one.memory["v/w"].item() == pytest.approx(0.16)
    assert one.adapter["w"].item() == pytest.approx(0.1 * 0.4 / 0.401, rel=1e-6) and one.memory["t"].item() == 1
    two = METHOD.aggregate(8, one, [update("a", plain(one.adapter["w"].item() + 2.0))])
    # Δ = 2; m = .9·.4 + .1·2 = .56; v = .99·.16 + .01·4 = .1984; η₂ = .1·√(1 − .99²) / (1 − .9²)
    step = 0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2) * 0.56 / (0.1984**0.5 + 0.001)
    assert (two.adapter["w"] - one.adapter["w"]).item() == pytest.approx(step, rel=1e-5)


def test_three_rounds_equal_flower_s_with_the_number_of_earlier_steps() -> None:
    state, theirs = ServerState(adapter=random_adapter(0)), flower.FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    for round in (1, 2, 3):
        updates = [update(f"c{i}", random_adapter(10 * round + i), n) for i, n in enumerate((1, 7, 40))]
        theirs.current_arrays = _flower.numpy(state.adapter.tensors)
        state = METHOD.aggregate(round, state, iter(updates))
        expected = flower_result(theirs, [_flower.reply(u.adapter.tensors, u.examples) for u in updates], round - 1)
        assert all(torch.allclose(state.adapter[n], expected[n].float(), atol=1e-6) for n in state.adapter.tensors)


def test_flowers_own_count_of_rounds_is_detected() -> None:
    state, theirs = ServerState(adapter=plain(0.0)), flower.FedAdam(eta=0.1, tau=1e-3)
    theirs.current_arrays = _flower.numpy(state.adapter.tensors)
    wrong = flower_result(theirs, [_flower.reply(plain(4.0).tensors, 1)], 1)
    right = METHOD.aggregate(1, state, [update("a", plain(4.0))]).adapter["w"].item()
    assert wrong["w"].item() / right == pytest.approx((1 - 0.99**2) ** 0.5 / (1 - 0.9**2), rel=1e-5)  # .74


def test_a_restart_continues_bit_for_bit(tmp_path: Path) -> None:
    one = METHOD.aggregate(
        1, ServerState(adapter=random_adapter(0)), [update("a", random_adapter(1), 3), update("b", random_adapter(2), 4)]
    )
    again = ServerState(adapter=one.adapter, memory=reload(one.memory, tmp_path))
    outs = [METHOD.aggregate(2, s, [update("a", random_adapter(3))]) for s in (one, again)]
    assert close(outs[0].adapter, outs[1].adapter, atol=0)
    assert all(torch.equal(outs[0].memory[n], outs[1].memory[n]) for n in outs[0].memory) and outs[0].memory["t"].item() == 2
    assert not close(
        outs[0].adapter, METHOD.aggregate(2, ServerState(adapter=one.adapter), [update("a", random_adapter(3))]).adapter, atol=1e-2
    )


def test_unchanged_parameters_stay() -> None:
    state = ServerState(adapter=random_adapter(0))
    assert close(METHOD.aggregate(1, state, [update("a", random_adapter(0))]).adapter, state.adapter, atol=0)


@pytest.mark.parametrize("bad", [FedAdam(lr=0.0), FedAdam(beta_1=1.0), FedAdam(beta_2=-0.1), FedAdam(tau=0.0)])
def test_settings_out_of_bounds_are_refused(bad: FedAdam) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.\w+=.* is out of range"):
        bad.check(Config())

"""FedYogi on numbers that can be checked by hand, and against Flower's unmodified class."""

from pathlib import Path

import pytest
import torch
from flwr.serverapp import strategy as flower

from fedtune.config import Config
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError
from fedtune.strategies import _flower
from fedtune.strategies.fedadam import FedAdam
from fedtune.strategies.fedyogi import FedYogi
from tests.strategies.updates import close, flower_result, plain, random_adapter, reload, update

METHOD = FedYogi(lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)


def two_rounds(method: FedYogi | FedAdam) -> ServerState:
    """Δ = 4, then Δ = .1."""
    one = method.aggregate(1, method.start(plain(0.0)), [update("a", plain(1.0), 1), update("b", plain(5.0), 3)])
    return method.aggregate(2, one, [update("a", plain(one.adapter["w"].item() + 0.1))])


def test_two_rounds_by_hand() -> None:
    one = METHOD.aggregate(1, METHOD.start(plain(0.0)), [update("a", plain(1.0), 1), update("b", plain(5.0), 3)])
    # Δ = 4; m = .4; v = 0 − .01·16·sign(0 − 16) = .16; w = .1·.4 / (.4 + .001)
    assert one.adapter["w"].item() == pytest.approx(0.1 * 0.4 / 0.401, rel=1e-6)
    # Δ = .1; v = .16 − .01·.01·sign(.16 − .01) = .1599; m = .9·.4 + .1·.1 = .37
    two = two_rounds(METHOD)
    assert two.memory["v/w"].item() == pytest.approx(0.1599, rel=1e-5) and two.memory["m/w"].item() == pytest.approx(0.37, rel=1e-5)
    assert (two.adapter["w"] - one.adapter["w"]).item() == pytest.approx(0.1 * 0.37 / (0.1599**0.5 + 0.001), rel=1e-5)


def test_adams_second_moment_would_be_caught() -> None:
    # Adam's v = .99·.16 + .01·.01 = .1585
    assert two_rounds(FedAdam(lr=0.1)).memory["v/w"].item() == pytest.approx(0.1585, rel=1e-4)


def test_three_rounds_equal_flower_s() -> None:
    state, theirs = ServerState(adapter=random_adapter(0)), flower.FedYogi(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
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


@pytest.mark.parametrize("bad", [FedYogi(lr=0.0), FedYogi(beta_1=1.0), FedYogi(beta_2=-0.1), FedYogi(tau=0.0)])
def test_settings_out_of_bounds_are_refused(bad: FedYogi) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.\w+=.* is out of range"):
        bad.check(Config())

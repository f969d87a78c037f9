"""FedProx: FedAvg with a proximal term in the plan."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.clients.trainer import train
from fedtune.clients.workspace import Workspace
from fedtune.config import ClientConfig, Config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.strategies import _mean
from fedtune.strategies.fedprox import FedProx
from tests.strategies.updates import plain, random_adapter, update
from tests.tiny import tiny_config
from tests.working import work_in


def test_the_plan_carries_mu_and_nothing_else() -> None:
    state, plans = ServerState(adapter=random_adapter(0)), [Plan(round=2, client=c, base_version=1, lr=0.5) for c in "ab"]
    assignments = FedProx(mu=0.3).plan(2, plans, state)
    assert [assignments[p.client].plan for p in plans] == [dataclasses.replace(p, turn="fedprox", params={"mu": 0.3}) for p in plans]
    assert all(g.adapter is state.adapter for g in assignments.values())


def check_by_hand() -> None:
    """Two clients that minimize ½(w − target)² + μ/2·(w − w_t)² to the end: w = (target + μ·w_t) / (1 + μ)."""
    method, state = FedProx(mu=1.0), ServerState(adapter=plain(4.0))
    assignments = method.plan(1, [Plan(round=1, client=c, base_version=0) for c in "ab"], state)

    def best(client: str, target: float) -> AdapterState:
        mu, w = float(assignments[client].plan.params.get("mu") or 0.0), assignments[client].adapter["w"].item()
        return plain((target + mu * w) / (1 + mu))

    out = method.aggregate(1, state, iter([update("a", best("a", 0.0), 1), update("b", best("b", 8.0), 3)]))
    # by hand: a stops at (0 + 4) / 2 = 2, b at (8 + 4) / 2 = 6; (1·2 + 3·6) / 4 = 5. With μ = 0: (0 + 3·8) / 4 = 6
    assert out.adapter["w"].item() == 5.0


def test_a_round_by_hand() -> None:
    check_by_hand()


@pytest.mark.parametrize(
    ("where", "name", "wrong"),
    [
        pytest.param(FedProx, "plan", Strategy.plan, id="mu dropped"),
        pytest.param(_mean.Mean, "add", lambda self, tensors, weight: ADD(self, tensors, 1.0), id="weights dropped"),
    ],
)
def test_a_missing_half_is_detected(where: type, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


ADD = _mean.Mean.add


def error_of_step(space: Workspace, mu: float, sent_mu: float) -> float:
    """Distance of two real SGD steps with `sent_mu` as μ from w_2(μ) = w_2(0) − η·μ·(w_1 − w_0): the term is 0 in the first step."""
    begin = space.initial
    gen = torch.Generator().manual_seed(1)  # B away from zero, so that both factors have gradients
    begin = begin.replace({n: t + 0.05 * torch.randn(t.shape, generator=gen) for n, t in begin.tensors.items()})

    def after(steps: int, prox: float) -> AdapterState:
        plan = Plan(round=1, client="c0", base_version=0, steps=steps, epochs=None, batch_size=4, lr=0.1, lr_last=0.1)
        plan = dataclasses.replace(plan, optimizer="sgd", clip_norm=None, turn="fedprox", params={"mu": prox})
        space.live.load(begin)
        train(work_in(space, plan))
        return space.live.read(version=0)

    one, two, held = after(1, 0.0), after(2, 0.0), after(2, sent_mu)
    return max(float((held[n] - (two[n] - 0.1 * mu * (one[n] - begin[n]))).abs().max()) for n in begin.tensors)


def test_the_clients_half_by_hand(tmp_path: Path) -> None:
    space = Workspace(tiny_config(tmp_path))
    assert error_of_step(space, mu=3.0, sent_mu=3.0) < 1e-7
    assert error_of_step(space, mu=3.0, sent_mu=6.0) > 1e-5  # μ·‖w − w_t‖², without the half
    assert error_of_step(space, mu=3.0, sent_mu=0.0) > 1e-5


def test_mu_is_set_in_one_place() -> None:
    with pytest.raises(ConfigError, match=r"strategy.mu=0.01 and client.prox=0.5 both set the proximal weight: leave client.prox at 0"):
        FedProx().check(Config(client=ClientConfig(prox=0.5)))
    with pytest.raises(ConfigError, match="strategy.mu=-1 is out of range"):
        FedProx(mu=-1).check(Config())
    FedProx().check(Config())
    FedProx(mu=0.5).check(Config(client=ClientConfig(prox=0.5)))

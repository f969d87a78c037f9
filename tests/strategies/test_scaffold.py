"""SCAFFOLD: control variates by hand, and their effect."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.config import ClientConfig, Config, TrafficConfig
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, ServerState, Strategy
from fedtune.errors import ConfigError, UpdateError
from fedtune.strategies import scaffold as module
from fedtune.strategies.scaffold import SCAFFOLD
from tests.strategies.updates import close, plain, random_adapter, reload, update


def plans(*clients: str) -> list[Plan]:
    return [Plan(round=1, client=c, base_version=0) for c in clients]


def test_two_rounds_by_hand() -> None:
    method, state = SCAFFOLD(), ServerState(adapter=plain(0.0))
    assert all(not a.extra for a in method.plan(1, plans("a", "b"), state).values())  # c = c_k = 0: nothing to send
    one = method.aggregate(1, state, [update("a", plain(1.0), 50, lr_sum=0.5), update("b", plain(3.0), 1, lr_sum=0.5)])
    # uniform: w = 2. c_a = (0 − 1) / .5 = −2, c_b = (0 − 3) / .5 = −6, c = (−2 − 6) / 2 = −4
    assert one.adapter["w"].item() == 2.0
    assert {n: t.item() for n, t in one.memory.items()} == {"c_k/a/w": -2.0, "c_k/b/w": -6.0, "c/w": -4.0}
    assignments = method.plan(2, plans("a", "b", "new"), one)
    assert assignments["a"].extra["w"].item() == -2.0 and assignments["b"].extra["w"].item() == 2.0 and not assignments["new"].extra
    two = method.aggregate(2, one, [update("a", plain(5.0), lr_sum=1.5), update("new", plain(8.0), lr_sum=1.0)])
    # c_a⁺ = −2 + 4 + (2 − 5) / 1.5 = 0; a new client's c_k is c: c_new⁺ = (2 − 8) / 1 = −6; c = (0 − 6 − 6) / 3 = −4, the mean of all three
    assert {n: t.item() for n, t in two.memory.items()} == {"c_k/a/w": 0.0, "c_k/b/w": -6.0, "c_k/new/w": -6.0, "c/w": -4.0}
    assert two.adapter["w"].item() == 6.5


def test_the_variate_c_of_a_single_client_is_its_own() -> None:
    out = SCAFFOLD().aggregate(1, ServerState(adapter=plain(0.0)), [update("a", plain(1.0), lr_sum=0.5)])
    assert {n: t.item() for n, t in out.memory.items()} == {"c_k/a/w": -2.0, "c/w": -2.0}  # (0 − 1) / .5


def test_c_is_the_mean_of_the_clients_seen_for_any_participation() -> None:
    method, state = SCAFFOLD(lr=0.5), ServerState(adapter=random_adapter(0))
    for round, cohort in enumerate(("ab", "bc", "ad", "abcd", "c"), 1):
        state = method.aggregate(
            round, state, [update(c, random_adapter(10 * round + i), lr_sum=0.1 * (i + 1)) for i, c in enumerate(cohort)]
        )
        own: dict[str, list[Tensor]] = {}
        for name, t in state.memory.items():
            if name.startswith("c_k/"):
                own.setdefault(name.rpartition("/")[2], []).append(t)
        assert all(torch.allclose(state.memory[f"c/{n}"], torch.stack(ts).mean(0), atol=1e-4) for n, ts in own.items())
    assert len(own["head.weight"]) == 4


def test_the_server_s_rate_scales_the_step() -> None:
    out = SCAFFOLD(lr=0.5).aggregate(
        1, ServerState(adapter=plain(2.0)), [update("a", plain(4.0), lr_sum=1.0), update("b", plain(8.0), lr_sum=1.0)]
    )
    assert out.adapter["w"].item() == 4.0  # 2 + .5·(6 − 2)


def test_identical_clients_at_full_participation_need_no_correction() -> None:
    method, state = SCAFFOLD(), ServerState(adapter=random_adapter(0))
    for round in range(1, 4):
        state = method.aggregate(round, state, [update(c, random_adapter(round), lr_sum=0.3) for c in "abc"])
        for assignment in method.plan(round + 1, plans(*"abc"), state).values():
            assert all(t.abs().max() < 1e-5 for t in assignment.extra.values())


TARGETS = {"a": (1.0, 4.0), "b": (10.0, 1.0)}  # F_k(w) = curvature / 2 · (w − target)²: client → (target, curvature)
BEST = (1.0 * 4.0 + 10.0 * 1.0) / (4.0 + 1.0)


def descend(given: Mapping[str, Assignment], lr: float, last: float, steps: int) -> list[Update]:
    """The clients' training on a quadratic loss: SGD along g + correction with the rate falling linearly within the turn."""
    updates = []
    for client, assignment in given.items():
        target, curvature = TARGETS[client]
        w, rates = assignment.adapter["w"].clone(), [lr + (last - lr) * s / steps for s in range(steps)]
        for rate in rates:
            w = w - rate * (curvature * (w - target) + assignment.extra.get("w", torch.zeros(1)))
        updates.append(update(client, assignment.adapter.replace({"w": w}), lr_sum=sum(rates)))
    return updates


def walk(rounds: int = 200) -> float:
    method: Strategy = SCAFFOLD()
    state = ServerState(adapter=plain(0.0))
    for round in range(1, rounds + 1):
        state = method.aggregate(round, state, descend(method.plan(round, plans("a", "b"), state), 0.1, 0.05, 8))
    return state.adapter["w"].item()


def test_scaffold_reaches_the_minimum_of_the_mean_loss_unlike_fedavg(monkeypatch: pytest.MonkeyPatch) -> None:
    assert walk() == pytest.approx(BEST, abs=1e-3)
    monkeypatch.setattr(SCAFFOLD, "plan", Strategy.plan)  # no correction: uniform FedAvg, which drifts
    assert abs(walk() - BEST) > 0.3


def test_a_correction_of_the_wrong_sign_or_size_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SCAFFOLD.plan

    def flip(self: SCAFFOLD, round: int, plans: list[Plan], state: ServerState) -> dict[str, Assignment]:
        given = own(self, round, plans, state)
        return {c: Assignment(plan=a.plan, adapter=a.adapter, extra={n: -t for n, t in a.extra.items()}) for c, a in given.items()}

    with monkeypatch.context() as patch:
        patch.setattr(SCAFFOLD, "plan", flip)
        assert not abs(walk() - BEST) < 0.1
    with monkeypatch.context() as patch:  # the mean rate in place of the sum of the rates
        patch.setattr(module, "measured", lambda update, values, name: values[name] / 8)
        assert not abs(walk() - BEST) < 0.1


def test_a_restart_continues_bit_for_bit(tmp_path: Path) -> None:
    method = SCAFFOLD()
    one = method.aggregate(
        1,
        ServerState(adapter=random_adapter(0)),
        [update("a/b", random_adapter(1), lr_sum=0.1), update("c", random_adapter(2), lr_sum=0.2)],
    )
    again = ServerState(adapter=one.adapter, memory=reload(one.memory, tmp_path))
    outs = [method.aggregate(2, s, [update("c", random_adapter(3), lr_sum=0.1)]) for s in (one, again)]
    assert close(outs[0].adapter, outs[1].adapter, atol=0)
    assert all(torch.equal(t, outs[1].memory[n]) for n, t in outs[0].memory.items())
    assert len(one.memory) == 3 * 5


def test_a_turn_at_rate_zero_changes_no_control_variate() -> None:
    out = SCAFFOLD().aggregate(1, ServerState(adapter=plain(2.0)), [update("a", plain(2.0), lr_sum=0.0)])
    assert out.adapter["w"].item() == 2.0 and set(out.memory) == {"c/w"}


@pytest.mark.parametrize("traffic", [TrafficConfig(up=u) for u in ("fp16", "bf16", "int8", "nf4")] + [TrafficConfig(topk=0.01)])
def test_compressed_updates_are_refused(traffic: TrafficConfig) -> None:
    # c_k is (w - w_k) / lr_sum: if 99 % of w - w_k is missing, or it is rounded, c_k is another gradient
    client = ClientConfig(optimizer="sgd", clip_norm=None)
    with pytest.raises(ConfigError, match="set traffic.up=fp32 traffic.topk=null"):
        SCAFFOLD().check(Config(client=client, traffic=traffic))
    SCAFFOLD().check(Config(client=client, traffic=TrafficConfig(topk=1.0, down="bf16")))


def test_other_optimizers_and_clipping_are_refused() -> None:
    for client in (ClientConfig(), ClientConfig(optimizer="sgd"), ClientConfig(clip_norm=None)):
        with pytest.raises(ConfigError, match="set client.optimizer=sgd client.clip_norm=null"):
            SCAFFOLD().check(Config(client=client))
    SCAFFOLD().check(Config(client=ClientConfig(optimizer="sgd", clip_norm=None)))
    with pytest.raises(ConfigError, match="strategy.lr=0.0 is out of range"):
        SCAFFOLD(lr=0.0).check(Config(client=ClientConfig(optimizer="sgd", clip_norm=None)))
    with pytest.raises(UpdateError, match="client old sent lr_sum=None"):
        SCAFFOLD().aggregate(1, ServerState(adapter=plain(0.0)), [update("old", plain(1.0))])

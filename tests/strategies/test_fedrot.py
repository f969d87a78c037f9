"""FedRot-LoRA: factors of one product are aligned before the mean."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedtune.clients.turns import fedrot, turn_of
from fedtune.clients.turns.fedrot import FedRot as Turn
from fedtune.clients.turns.fedrot import rotation
from fedtune.config import Config, PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError, PlanError
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedrot import FedRot
from tests.strategies.updates import close, random_adapter, update

ROUNDS = {1: "lora_A", 2: "lora_B"}


def aligned(trained: AdapterState, start: AdapterState, share: float = 1.0, round: int = 1) -> AdapterState:
    """What a client sends that trained this adapter in this round."""
    plan = FedRot(share=share).plan(round, [Plan(round=round, client="a", base_version=0)], ServerState(adapter=start))["a"].plan
    return turn_of(plan).finish(cast(Any, SimpleNamespace(start=start, plan=plan)), trained)


def product(adapter: AdapterState) -> Tensor:
    return torch.cat([adapter.product(m).flatten() for m in adapter.spec.ranks])


def gauge(adapter: AdapterState, seed: int, reflect: bool = False) -> AdapterState:
    """(B·Q, Qᵀ·A) with a random orthogonal Q, of determinant −1 with `reflect`."""
    draw, tensors = torch.Generator().manual_seed(seed), dict(adapter.tensors)
    for module, rank in adapter.spec.ranks.items():
        q = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64)).Q
        if (torch.det(q) < 0) != reflect:
            q[:, 0] = -q[:, 0]
        tensors[f"{module}.lora_A"] = (q.T @ adapter[f"{module}.lora_A"].double()).float()
        tensors[f"{module}.lora_B"] = (adapter[f"{module}.lora_B"].double() @ q).float()
    return adapter.replace(tensors)


def test_a_turned_sign_by_hand() -> None:
    spec = AdapterSpec(method="lora", ranks={"q": 1}, scaling={"q": 1.0})
    start, turned = (
        AdapterState({"q.lora_A": torch.tensor([[a]]), "q.lora_B": torch.tensor([[b]])}, spec) for a, b in ((2.0, 3.0), (-4.0, -5.0))
    )
    # N = (−4)·2 < 0, so Q = −1: (A, B) = (4, 5). FedAvg's mean with (2, 3) is (−1)·(−1) = 1 without, 3·4 = 12 with the rotation
    for share in (0.5, 0.75, 1.0):
        sent = aligned(turned, start, share)
        assert (sent["q.lora_A"].item(), sent["q.lora_B"].item()) == (4.0, 5.0)
    assert aligned(turned, start, 0.25)["q.lora_A"].item() == -4.0  # (1 − ¼) − ¼ > 0: nearest to +1
    after = FedRot().aggregate(1, ServerState(adapter=start), [update("a", aligned(turned, start)), update("b", start)])
    assert product(after.adapter).item() == 12.0


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("round", ROUNDS)
def test_the_product_stays(share: float, round: int) -> None:
    start, trained = random_adapter(0), random_adapter(1)
    sent = aligned(trained, start, share, round)
    torch.testing.assert_close(product(sent), product(trained), rtol=1e-5, atol=1e-6)
    assert torch.equal(sent["head.weight"], trained["head.weight"]) and not torch.equal(sent["q.lora_A"], trained["q.lora_A"])


@pytest.mark.parametrize("round", ROUNDS)
def test_the_aligned_factor_comes_nearer(round: int) -> None:
    start, factor = random_adapter(0), ROUNDS[round]
    trained = gauge(start, 1)
    apart = [float((aligned(trained, start, share, round)[f"q.{factor}"] - start[f"q.{factor}"]).norm()) for share in (0.0, 0.5, 1.0)]
    assert apart[0] > apart[1] > apart[2]


def gauges_of_one_adapter() -> float:
    """Relative error of FedAvg's product over 6 gauges of one adapter, half of them reflections, after the best rotation."""
    start = random_adapter(0)
    sent = [update(f"c{i}", aligned(gauge(start, i, reflect=i % 2 == 0), start), 1 + i) for i in range(6)]
    after = FedRot(share=1.0).aggregate(1, ServerState(adapter=start), sent).adapter
    return float((product(after) - product(start)).norm() / product(start).norm())


def test_gauges_of_one_adapter_average_to_it() -> None:
    assert gauges_of_one_adapter() < 1e-6


def forced(x: Tensor) -> Tensor:
    """The rotation with determinant 1, as in the public code."""
    u, _, vt = torch.linalg.svd(x)
    u[:, -1] *= torch.det(u @ vt).sign()
    return u @ vt


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("_orthogonal", forced, id="determinant forced to 1"),
        pytest.param("rotation", lambda n, share: rotation(n, share).T, id="transposed"),
        pytest.param("rotation", lambda n, share: rotation(n, 0.4), id="too little"),
    ],
)
def test_the_check_notices_wrong_rotations(name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedrot, name, wrong)
    assert gauges_of_one_adapter() > 0.05


def test_half_a_share_of_a_half_turn_turns_all_the_way() -> None:
    for entries in ([[1.0, 0.0], [0.0, -1.0]], [[-1.0, 0.0], [0.0, -1.0]], [[0.6, 0.8], [0.8, -0.6]]):
        best = torch.tensor(entries, dtype=torch.float64)
        q = rotation(best, 0.5)
        torch.testing.assert_close(q, best, rtol=0, atol=1e-8)  # (I + Q)/2 is singular
        noisy = rotation(best + 1e-9 * torch.randn(2, 2, generator=torch.Generator().manual_seed(1)), 0.5)
        torch.testing.assert_close(noisy, q, rtol=0, atol=1e-2)  # rounding errors do not choose the direction
    quarter = rotation(torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64), 0.5)
    torch.testing.assert_close(
        quarter, torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / 2**0.5, rtol=0, atol=1e-5
    )  # 45 of 90 degrees


def test_directions_that_nothing_determines_stay() -> None:
    q = rotation(torch.diag(torch.tensor([-2.0, 0.0, 0.0], dtype=torch.float64)), 1.0)
    torch.testing.assert_close(q, torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)))


def test_a_share_of_0_is_fedavg_bit_for_bit() -> None:
    start, trained = random_adapter(0), [random_adapter(i) for i in (1, 2, 3)]
    sent = [update(f"c{i}", aligned(x, start, 0.0), 1 + i) for i, x in enumerate(trained)]
    theirs = [update(f"c{i}", x, 1 + i) for i, x in enumerate(trained)]
    one, two = FedRot(share=0.0).aggregate(1, ServerState(adapter=start), sent), FedAvg().aggregate(1, ServerState(adapter=start), theirs)
    assert all(torch.equal(one.adapter[n], t) for n, t in two.adapter.tensors.items())


@pytest.mark.parametrize("round", ROUNDS)
def test_nothing_is_rotated_while_b_is_0(round: int) -> None:
    start = random_adapter(0)
    start = start.replace({n: torch.zeros_like(t) if n.endswith("lora_B") else t for n, t in start.tensors.items()})
    trained = random_adapter(1)
    assert all(torch.equal(aligned(trained, start, 1.0, round)[n], t) for n, t in trained.tensors.items())


@pytest.mark.parametrize("round", ROUNDS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_without_training_nothing_changes(round: int, share: float) -> None:
    start = random_adapter(0)
    wide = start.replace(  # a rank above both sizes of the layer
        {**start.tensors, "q.lora_A": torch.randn(7, 5), "q.lora_B": torch.randn(3, 7)}, ranks={"q": 7, "up": 1}
    )
    for adapter in (start, wide):
        assert close(aligned(adapter, adapter, share, round), adapter, 1e-5)


def test_the_plan_alternates_and_checks() -> None:
    state = ServerState(adapter=random_adapter(0))
    for round, factor in ROUNDS.items():
        plan = Plan(round=round, client="a", base_version=0)
        given = FedRot().plan(round, [plan], state)["a"]
        assert given.plan == dataclasses.replace(plan, turn="fedrot", params={"share": 0.5, "factor": factor}) and given.recombines
    with pytest.raises(PlanError, match="the turn's factor=lora_C is not known"):
        Turn(share=0.5, factor="lora_C").check()
    with pytest.raises(ConfigError, match=r"strategy.share=1.1 is out of range"):
        FedRot(share=1.1).check(Config())
    for method in ("ia3", "full", "ravan"):
        with pytest.raises(ConfigError, match=f"strategy=fedrot does not work with peft.method={method}: it rotates LoRA's factors"):
            FedRot().check(Config(peft=PeftConfig(method=method)))
    FedRot().check(Config(peft=PeftConfig(method="dora")))

"""FedPepTAO's ratio: Lanczos against dense Hessians, and the search for the point where the share has settled."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.clients.turns import fedpeptao as hessian
from fedtune.clients.turns import turn_of
from fedtune.clients.turns.fedpeptao import hessian_product, settled_share, share_above, spectrum
from fedtune.clients.workspace import Workspace
from fedtune.config import PeftConfig
from fedtune.contracts.plan import Plan
from fedtune.data import collate
from fedtune.errors import UpdateError
from fedtune.models import loss_sum
from tests.tiny import tiny_config
from tests.working import work_in

PLAN = Plan(round=1, client="c0", base_version=0, turn="fedpeptao", params={"share": True}, batch_size=6, seed=3)


def signs(size: int, seed: int = 0) -> Tensor:
    return (torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1).double()


def toy() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Cross-entropy of a two-layer net with tanh, 50 parameters: (4 → 6) and (6 → 4) with 2 biases; and a random point (50,)."""
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, generator=gen, dtype=torch.float64), torch.randint(0, 4, (20,), generator=gen)

    def loss(w: Tensor) -> Tensor:
        first, second, shift = w[:24].view(6, 4), w[24:48].view(4, 6), w[48:]
        return torch.nn.functional.cross_entropy(torch.tanh(x @ first.T + shift[0]) @ second.T * (1 + shift[1]), y)

    return loss, 0.7 * torch.randn(50, generator=gen, dtype=torch.float64)


def assert_products_match(times: Callable[[Tensor], Tensor], dense: Tensor) -> None:
    v = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(times(v), dense @ v, atol=1e-10)


def test_products_are_those_of_the_dense_hessian_over_several_tensors() -> None:
    loss, w = toy()
    dense = torch.autograd.functional.hessian(loss, w)
    assert isinstance(dense, Tensor)
    parts = [t.clone().requires_grad_() for t in (w[:24].view(6, 4), w[24:48], w[48:])]
    times = hessian_product(loss(torch.cat([p.flatten() for p in parts])), parts)
    assert_products_match(times, dense)
    with pytest.raises(AssertionError):  # the check detects parts in another order
        assert_products_match(lambda v: times(v.flip(0)), dense)


def test_lanczos_finds_the_dense_spectrum() -> None:
    loss, w = toy()
    dense = torch.autograd.functional.hessian(loss, w)
    assert isinstance(dense, Tensor)
    exact, vectors = torch.linalg.eigh(dense)
    values, weights = spectrum(lambda v: dense @ v, signs(50), 50)
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    # the mass below any point between eigenvalues is that of the start vector
    shares = (vectors.T @ signs(50)) ** 2 / 50
    for cut in (-0.01, 0.003, 0.02, 0.05, 0.1, 0.3):
        assert float((exact - cut).abs().min()) > 1e-5
        assert weights[values <= cut].sum().item() == pytest.approx(shares[exact <= cut].sum().item(), abs=1e-6)
    assert values[-1].item() == pytest.approx(exact[-1].item(), rel=1e-9) and values[0].item() == pytest.approx(exact[0].item(), rel=1e-6)


def test_few_steps_keep_the_moments() -> None:
    loss, w = toy()
    dense = torch.autograd.functional.hessian(loss, w)
    assert isinstance(dense, Tensor)
    values, weights = spectrum(lambda v: dense @ v, signs(50), 6)
    power = signs(50) / math.sqrt(50)
    for k in range(12):  # m nodes are exact up to the power 2m − 1
        assert (weights * values**k).sum().item() == pytest.approx((power @ torch.linalg.matrix_power(dense, k) @ power).item(), rel=1e-8)


def test_the_mean_over_starts_is_the_share_of_eigenvalues() -> None:
    loss, w = toy()
    dense = torch.autograd.functional.hessian(loss, w)
    assert isinstance(dense, Tensor)
    exact = torch.linalg.eigvalsh(dense)
    for cut in (-0.005, 0.02, 0.1):
        results = []
        for seed in range(60):
            values, weights = spectrum(lambda v: dense @ v, signs(50, seed), 50)
            results.append(weights[values <= cut].sum().item())
        assert sum(results) / 60 == pytest.approx((exact <= cut).double().mean().item(), abs=0.03)


def test_a_small_krylov_space_stops_early() -> None:
    values, weights = spectrum(lambda v: 3.0 * v, signs(50), 50)
    assert values.tolist() == pytest.approx([3.0]) and weights.tolist() == pytest.approx([1.0])
    values, weights = spectrum(lambda v: 0.0 * v, signs(50), 50)
    assert values.tolist() == [0.0]


def test_lanczos_with_one_parameter() -> None:
    values, weights = spectrum(lambda v: -2.0 * v, signs(1), 50)
    assert values.tolist() == [-2.0] and weights.tolist() == [1.0]


def test_a_non_finite_curvature_is_an_error() -> None:
    with pytest.raises(UpdateError, match="the curvature of the prompts is not finite"):
        spectrum(lambda v: v * math.nan, signs(5), 3)


def find_share(values: list[float], weights: list[float]) -> float:
    return settled_share(torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))


def test_the_settled_share_by_hand() -> None:
    assert find_share([-1.0, 5.0], [0.7, 0.3]) == pytest.approx(0.3)  # ρ(0) = .3, and so at .1, .2, .3
    # ρ = .9 at 0, .1 and .2; .8 at .3 and on: settles at .6, above half of ρ(0)
    assert find_share([-1.0, 0.25, 5.0], [0.1, 0.1, 0.8]) == pytest.approx(0.8)
    # ρ(.1) = .3 is less than half of ρ(0) = 1, so the step is halved until three steps fit below the node at .05
    assert find_share([0.05, 5.0], [0.7, 0.3]) == pytest.approx(1.0, abs=1e-4)
    # ρ falls by .007 a step up to .5, which is not settled, and by .004, which is: three steps from 0
    nodes = [0.05, 0.15, 0.25, 0.35, 0.45, 5.0]
    assert find_share(nodes, [0.007] * 5 + [0.965]) == pytest.approx(0.965)
    assert find_share(nodes, [0.004] * 5 + [0.98]) == pytest.approx(0.988)
    assert find_share([-2.0, -1.0], [0.5, 0.5]) == 0.0
    assert find_share([1e4, 1e6], [0.5, 0.5]) == pytest.approx(1.0)


def test_the_density_is_smoothed_by_its_range() -> None:
    # range 4 → σ = √(4e-5); Φ(1) = .8413 of a node's mass is below one σ above it
    values, weights = torch.tensor([1.0, 5.0], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert share_above(1.0 + math.sqrt(4e-5), values, weights) == pytest.approx(1.0 - 0.5 * 0.841345, abs=1e-6)


@given(st.lists(st.tuples(st.floats(-1.0, 3.0), st.floats(1e-3, 1.0)), min_size=1, max_size=20), st.sampled_from([1e-4, 1.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_the_search_always_ends(nodes: list[tuple[float, float]], scale: float) -> None:
    total = sum(w for _, w in nodes)
    share = find_share([v * scale for v, _ in nodes], [w / total for _, w in nodes])
    assert 0.0 <= share <= 1.0


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    space = Workspace(tiny_config(tmp_path_factory.mktemp("hessian"), peft=PeftConfig(method="ptuning_v2", tokens=1)))
    with torch.no_grad():
        for p in space.live.parameters.values():
            p.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    return space


def test_the_ratio_of_a_backbone_is_that_of_its_dense_hessian(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    # the curvature of random weights is far smaller than the smoothing and its steps: without this, any Hessian would give .5
    monkeypatch.setattr(hessian, "_VARIANCE", 1e-12)
    monkeypatch.setattr(hessian, "_STEP", 1e-5)
    examples, live = space.examples("c0", "train")[:6], space.live
    live.model.train()
    seen = turn_of(PLAN).observe(work_in(space, PLAN, examples=examples))
    assert (seen.spec.method, seen["ratio"].shape, seen["ratio"].dtype) == ("scores", (1,), torch.float64)
    assert live.model.training and all(p.requires_grad and p.grad is None for p in live.parameters.values())
    again = turn_of(PLAN).observe(work_in(space, PLAN, examples=examples))
    assert torch.equal(seen["ratio"], again["ratio"]) and 0.0 <= seen["ratio"].item() <= 1.0

    params = list(live.parameters.values())
    live.model.eval()
    live.model.set_attn_implementation("eager")  # another way to a second derivative
    loss, count = loss_sum(live.model, collate(examples, space.pad_id), space.config.task)
    times = hessian_product(loss / count, params)
    size = sum(p.numel() for p in params)
    dense = torch.stack([times(row) for row in torch.eye(size)]).double()
    live.model.set_attn_implementation("sdpa")
    assert torch.allclose(dense, dense.T, atol=1e-7) and float(dense.abs().max()) > 1e-4
    generator = torch.Generator().manual_seed(hessian.derive_seed(PLAN.seed, "lanczos"))
    start = (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).double()
    values, weights = spectrum(lambda v: (dense + dense.T) / 2 @ v, start, hessian.STEPS)
    assert seen["ratio"].item() == pytest.approx(settled_share(values, weights), abs=0.01)
    assert 0.02 < seen["ratio"].item() < 0.98

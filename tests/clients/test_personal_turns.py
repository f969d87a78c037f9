"""Turns with a personal adapter, by hand and against plain training: what is sent, what stays, and what the client's model is."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.clients.steps import batches
from fedtune.clients.trainer import train
from fedtune.clients.turns import Turn, Work, find
from fedtune.clients.turns.apfl import APFL
from fedtune.clients.turns.ditto import Ditto
from fedtune.clients.turns.feddat import FedDAT
from fedtune.clients.turns.feddpa import FedDPA
from fedtune.clients.turns.fedrep import FedRep
from fedtune.clients.turns.pfedme import PFedMe
from fedtune.clients.turns.plain import Plain
from fedtune.clients.workspace import Workspace
from fedtune.config import PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Plan
from fedtune.data import collate
from fedtune.models import loss_sum
from fedtune.models.losses import counted_logits
from fedtune.strategies._lowrank import at_ranks
from tests.tiny import tiny_config
from tests.working import work_in

SGD = {"optimizer": "sgd", "clip_norm": None}
PERSONAL: dict[str, Turn] = {
    "ditto": Ditto(mu=0.1),
    "pfedme": PFedMe(mu=1.0, inner_steps=2, inner_lr=0.1),
    "apfl": APFL(alpha=0.5, alpha_lr=0.1),
    "feddpa": FedDPA(mix=0.5, mix_lr=0.1),
    "feddat": FedDAT(temperature=3.0, weight=1.0),
}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tiny_config(tmp_path_factory.mktemp("personal"), peft=PeftConfig(rank=4, alpha=8.0, dropout=0.1)))


def state(space: Workspace, seed: int = 1, scale: float = 0.05) -> AdapterState:
    """Half of the slot's rank, and B away from zero, so that all tensors have gradients."""
    gen = torch.Generator().manual_seed(seed)
    half = at_ranks(space.initial, {m: r // 2 for m, r in space.initial.spec.ranks.items()})
    return half.replace({n: (t + scale * torch.randn(t.shape, generator=gen)).contiguous() for n, t in half.tensors.items()})


def take(space: Workspace, turn: Turn, start: AdapterState, kept: AdapterState | None = None, **changes: Any) -> tuple[AdapterState, Any]:
    """One turn: the tensors to send, and what the client keeps. As `take_turn` in clients/app.py."""
    given = {"steps": 3, "epochs": None, "batch_size": 4, "lr": 1e-2, "lr_last": 1e-2, **changes}
    plan, stored = Plan(round=1, client="c0", base_version=0, **given), list[AdapterState]()

    def retrain(start: AdapterState, other: Turn) -> AdapterState:
        space.live.load(start)
        train(dataclasses.replace(work, start=start), other)
        return space.live.read(version=0)

    space.live.load(start)
    work = work_in(space, plan, start=start, recall=lambda: kept, keep=stored.append, retrain=retrain)
    done = train(work, turn)
    trained = space.live.read(version=0)
    return turn.finish(dataclasses.replace(work, memory=done.memory), trained), stored[-1] if stored else None


def same(a: AdapterState, b: AdapterState) -> bool:
    return a.spec == b.spec and all(torch.equal(a[n], b[n]) for n in b.tensors)


def far(a: AdapterState, b: AdapterState) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in b.tensors)


def logits(space: Workspace, adapter: AdapterState) -> Tensor:
    space.live.load(adapter)
    space.live.model.eval()
    try:
        with torch.no_grad():
            return counted_logits(space.live.model, collate(space.examples("c1", "train")[:3], space.pad_id), space.config.task)[0]
    finally:
        space.live.model.train()


def gradient(space: Workspace, at: AdapterState, rows: Sequence[int]) -> dict[str, Tensor]:
    """Of the mean loss of these rows of c0, with dropout at 0."""
    space.live.load(at)
    batch = collate([space.examples("c0", "train")[i] for i in rows], space.pad_id)
    loss, count = loss_sum(space.live.model, batch, space.config.task)
    params = dict(space.live.parameters)
    found = dict(zip(params, torch.autograd.grad(loss / count, list(params.values())), strict=True))
    return {n: found[n][tuple(map(slice, t.shape))] for n, t in at.tensors.items()}


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Without dropout, for turns by hand."""
    return Workspace(tiny_config(tmp_path_factory.mktemp("still"), peft=PeftConfig(rank=4, alpha=8.0)))


def rows_of(space: Workspace, steps: int) -> list[list[int]]:
    count = len(space.examples("c0", "train"))
    return list(itertools.islice(batches(count, 4, 0), steps))


def test_every_turn_with_a_personal_adapter_is_tested_here() -> None:
    names = {p.stem for p in Path(str(__import__("fedtune.clients.turns", fromlist=["x"]).__file__)).parent.glob("[a-z]*.py")}
    assert {n for n in names if find(n).is_personal()} == set(PERSONAL)


# pFedMe steps along another gradient, and FedDAT's loss has another term
@pytest.mark.parametrize("name", ["ditto", "apfl", "feddpa"])
def test_the_shared_half_is_plain_training_bit_for_bit(space: Workspace, name: str) -> None:
    plain, _ = take(space, Plain(), state(space))
    sent, kept = take(space, PERSONAL[name], state(space))
    again, _ = take(space, PERSONAL[name], state(space), kept)
    assert same(sent, plain) and same(again, plain)


@pytest.mark.parametrize("name", PERSONAL)
def test_nobody_trains_nothing_changes(space: Workspace, name: str) -> None:
    turn, start = PERSONAL[name], state(space)
    first, kept = take(space, turn, start, lr=0.0, lr_last=0.0)
    assert far(first, start) == 0.0
    if name == "pfedme":
        return  # θ has a learning rate of its own
    second, again = take(space, turn, start, kept, lr=0.0, lr_last=0.0)
    assert far(second, start) == 0.0 and (name != "ditto" or same(again, kept))
    assert torch.allclose(logits(space, turn.personal(start, kept)), logits(space, start), atol=1e-5)
    fixed = {"apfl": APFL(alpha=0.3, alpha_lr=0.0), "feddpa": FedDPA(mix=0.3, mix_lr=0.0)}.get(name, turn)
    _, one = take(space, fixed, start, None, lr=0.0, lr_last=0.0)
    _, two = take(space, fixed, state(space, seed=5), one, lr=0.0, lr_last=0.0)
    assert far(two, one) < 1e-6


@pytest.mark.parametrize("name", PERSONAL)
def test_a_turn_is_repeated_bit_for_bit(space: Workspace, name: str) -> None:
    """A device that was killed in a turn takes it again."""
    _, before = take(space, PERSONAL[name], state(space))
    one, two = (take(space, PERSONAL[name], state(space, 2), before) for _ in range(2))
    assert same(one[0], two[0]) and same(one[1], two[1])


def test_without_a_kept_state_the_personal_adapter_is_the_shared_one(space: Workspace) -> None:
    for turn in PERSONAL.values():
        assert same(turn.personal(state(space), None), state(space))


# -- Ditto ---------------------------------------------------------------------------------------------------------------------------------


def test_ditto_without_the_term_is_local_training(space: Workspace) -> None:
    own = state(space, seed=3)
    local, _ = take(space, Plain(), own)
    _, kept = take(space, Ditto(mu=0.0), state(space), own)
    assert same(kept, local)


def test_ditto_with_a_large_term_stays_at_the_shared_adapter(still: Workspace) -> None:
    start, own = state(still), state(still, seed=3)
    # SGD with lr·μ = 1 jumps to w_t in one step, up to lr times the gradient
    _, kept = take(still, Ditto(mu=1e4), start, own, lr=1e-4, lr_last=1e-4, steps=4, **SGD)
    assert far(kept, start) < 1e-3 < far(own, start)


def test_a_step_of_ditto_by_hand(still: Workspace) -> None:
    start, own, (rows,) = state(still), state(still, seed=3), rows_of(still, 1)
    _, kept = take(still, Ditto(mu=0.7), start, own, lr=0.1, lr_last=0.1, steps=1, **SGD)
    g = gradient(still, own, rows)
    assert far(kept, own.replace({n: v - 0.1 * (g[n] + 0.7 * (v - start[n])) for n, v in own.tensors.items()})) < 1e-6


# -- pFedMe --------------------------------------------------------------------------------------------------------------------------------


def test_a_step_of_pfedme_by_hand(still: Workspace) -> None:
    w, (rows,) = state(still), rows_of(still, 1)
    sent, kept = take(still, PFedMe(mu=2.0, inner_steps=3, inner_lr=0.05), w, lr=0.1, lr_last=0.1, steps=1, **SGD)
    theta = w
    for _ in range(3):
        g = gradient(still, theta, rows)
        theta = theta.replace({n: t - 0.05 * (g[n] + 2.0 * (t - w[n])) for n, t in theta.tensors.items()})
    assert far(kept, theta) < 1e-6
    assert far(sent, w.replace({n: t - 0.1 * 2.0 * (t - theta[n]) for n, t in w.tensors.items()})) < 1e-6


@dataclasses.dataclass
class Quadratic:
    """½(θ − c)ᵀA(θ − c) as a live slot and its minibatch."""

    a: Tensor
    c: Tensor
    parameters: dict[str, torch.nn.Parameter] = dataclasses.field(default_factory=dict)

    def gradient(self, loss: Any = None) -> float:
        p = self.parameters["w"]
        p.grad = self.a @ (p.detach() - self.c)
        return self.loss()

    def loss(self) -> float:
        moved = self.parameters["w"].detach() - self.c
        return float(moved @ self.a @ moved / 2)


def test_many_inner_steps_of_pfedme_reach_the_proximal_point() -> None:
    gen = torch.Generator().manual_seed(0)
    root, c, w = (torch.randn(s, generator=gen, dtype=torch.float64) for s in ((5, 5), (5,), (5,)))
    quadratic = Quadratic(root @ root.T, c, {"w": torch.nn.Parameter(w.clone())})
    work: Any = Work(
        live=quadratic,  # type: ignore[arg-type]
        start=AdapterState({}, AdapterSpec(method="x")),
        plan=Plan(round=1, client="a", base_version=0),
        task=None,  # type: ignore[arg-type]
        examples=[],
        pad_id=0,
        minibatch=quadratic,
    )
    turn = PFedMe(mu=3.0, inner_steps=4000, inner_lr=0.01)
    memory = turn.begin(work)
    quadratic.gradient()
    turn.step(work, memory)
    best = torch.linalg.solve(quadratic.a + 3.0 * torch.eye(5, dtype=torch.float64), quadratic.a @ c + 3.0 * w)
    assert torch.allclose(memory.theta["w"], best, atol=1e-8)
    # the Moreau envelope's gradient, and w itself has not moved
    assert torch.allclose(quadratic.parameters["w"].grad, 3.0 * (w - best), atol=1e-7)  # type: ignore[arg-type]
    assert torch.equal(quadratic.parameters["w"].detach(), w)


# -- APFL ----------------------------------------------------------------------------------------------------------------------------------


def with_alpha(own: AdapterState, alpha: float) -> AdapterState:
    return own.replace({**own.tensors, "apfl.alpha": torch.tensor(alpha, dtype=torch.float64)})


def test_a_step_of_apfl_by_hand(still: Workspace) -> None:
    w, v, (rows,) = state(still), state(still, seed=3), rows_of(still, 1)
    sent, kept = take(still, APFL(alpha=0.9, alpha_lr=0.2), w, with_alpha(v, 0.3), lr=0.1, lr_last=0.1, steps=1, **SGD)
    mixed = w.replace({n: 0.3 * v[n] + 0.7 * t for n, t in w.tensors.items()})
    g, of_w = gradient(still, mixed, rows), gradient(still, w, rows)
    assert far(sent, w.replace({n: t - 0.1 * of_w[n] for n, t in w.tensors.items()})) < 1e-6
    assert far(kept, v.replace({n: t - 0.1 * 0.3 * g[n] for n, t in v.tensors.items()})) < 1e-6
    slope = sum(float(((v[n] - w[n]) * g[n]).sum()) for n in w.tensors)
    assert float(kept["apfl.alpha"]) == pytest.approx(0.3 - 0.2 * slope, abs=1e-6)
    # ∂f(v̄)/∂α by finite differences
    ahead, behind = (loss_at(still, w.replace({n: a * v[n] + (1 - a) * t for n, t in w.tensors.items()}), rows) for a in (0.31, 0.29))
    assert slope == pytest.approx((ahead - behind) / 0.02, rel=0.05)
    assert far(APFL.personal(w, with_alpha(v, 0.3)), mixed) < 1e-7


def loss_at(space: Workspace, at: AdapterState, rows: Sequence[int]) -> float:
    space.live.load(at)
    batch = collate([space.examples("c0", "train")[i] for i in rows], space.pad_id)
    with torch.no_grad():
        loss, count = loss_sum(space.live.model, batch, space.config.task)
    return loss.item() / count


def test_the_ends_of_apfl(space: Workspace) -> None:
    own = state(space, seed=3)
    _, kept = take(space, APFL(alpha=0.0, alpha_lr=0.0), state(space), with_alpha(own, 0.0))
    assert far(kept, own) == 0.0
    local, _ = take(space, Plain(), own)
    _, kept = take(space, APFL(alpha=1.0, alpha_lr=0.0), state(space), with_alpha(own, 1.0))
    assert far(kept, local) < 1e-6


# -- FedRep --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "first"), [(0.5, 2), (0.01, 1), (0.99, 3)])
def test_fedrep_trains_one_part_at_a_time(space: Workspace, share: float, first: int) -> None:
    own, start, seen = ("*.1.*",), state(space), list[AdapterState]()

    class Spy(FedRep):
        def step(self, work: Work, memory: Any) -> None:
            seen.append(work.live.read(version=0))
            super().step(work, memory)

    sent, _ = take(space, Spy(local_share=share), start, steps=4, keep=own, weight_decay=0.1)
    states = [*seen, sent]
    for step, (a, b) in enumerate(itertools.pairwise(states)):
        moved = {".1." in n for n in start.tensors if not torch.equal(a[n], b[n])}
        assert moved == {step < first}, step


WRONG: dict[str, tuple[Callable[[Workspace], None], str, Any]] = {
    "v is held near itself": (test_a_step_of_ditto_by_hand, "ditto.near", lambda sent, mu: Plain()),
    "w stays at θ": (test_a_step_of_pfedme_by_hand, "pfedme.put", lambda work, values: None),
    "the gradient at w moves v": (test_a_step_of_apfl_by_hand, "apfl.put", lambda work, values: None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_turn_is_detected(still: Workspace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    test, where, value = WRONG[name]
    monkeypatch.setattr(f"fedtune.clients.turns.{where}", value)
    with pytest.raises(AssertionError):
        test(still)

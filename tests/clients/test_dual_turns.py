"""Turns with two LoRA adapters, FedDPA and FedDAT, by hand: their mixture, what each adapter learns, and errors."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtune.clients.turns import Work
from fedtune.clients.turns._mixture import mixture, of_first
from fedtune.clients.turns.apfl import APFL
from fedtune.clients.turns.feddat import FedDAT
from fedtune.clients.turns.feddpa import FedDPA, _Inside
from fedtune.clients.turns.plain import Plain
from fedtune.clients.workspace import Workspace
from fedtune.config import PeftConfig
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.data import collate
from fedtune.errors import CheckpointError, UpdateError
from fedtune.models.losses import counted_logits, training_logits
from tests.clients.test_personal_turns import SGD, far, gradient, logits, loss_at, rows_of, state, take, with_alpha
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Without dropout, for turns by hand."""
    return Workspace(tiny_config(tmp_path_factory.mktemp("still"), peft=PeftConfig(rank=4, alpha=8.0)))


# -- mixtures ------------------------------------------------------------------------------------------------------------------------------


def test_a_mixture_is_exact_in_the_products() -> None:
    gen = torch.Generator().manual_seed(0)

    def one(rank: int, scale: float) -> AdapterState:
        a, b, head = (torch.randn(s, generator=gen) for s in ((rank, 5), (3, rank), (2, 7)))
        tensors = {"q.lora_A": a, "q.lora_B": b, "head.weight": head}
        return AdapterState(tensors, AdapterSpec(method="lora", ranks={"q": rank}, scaling={"q": scale}))

    parts = one(2, 4.0), one(3, 0.5)
    mixed = mixture((0.3, parts[0]), (0.7, parts[1]))
    assert mixed.spec.ranks == {"q": 5}
    assert torch.allclose(mixed.product("q"), 0.3 * parts[0].product("q") + 0.7 * parts[1].product("q"), atol=1e-5)
    assert torch.allclose(mixed["head.weight"], 0.3 * parts[0]["head.weight"] + 0.7 * parts[1]["head.weight"])
    # the gradient of the first part is that of the mixture, through B = [c·B_1, …] and head = c·head_1 + …
    leaves = {n: t.clone().requires_grad_() for n, t in parts[0].tensors.items()}
    whole = mixture((0.3, parts[0].replace(leaves)), (0.7, parts[1]))
    scalar = sum((t * (i + torch.arange(t.numel()).view(t.shape))).sum() for i, t in enumerate(whole.tensors.values()))
    of_mixture = {n: i + torch.arange(t.numel()).view(t.shape).float() for i, (n, t) in enumerate(whole.tensors.items())}
    got = of_first(of_mixture, parts[0], 0.3)
    for (name, leaf), want in zip(leaves.items(), torch.autograd.grad(scalar, list(leaves.values())), strict=True):  # type: ignore[arg-type]
        assert torch.allclose(got[name][tuple(map(slice, leaf.shape))], want), name


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_the_ends_of_the_dual_adapter_are_its_parts(still: Workspace, mix: float) -> None:
    shared, local = state(still, 1, 0.3), state(still, 2, 0.3)
    kept = local.replace({**local.tensors, "feddpa.mix": torch.tensor(mix, dtype=torch.float64)})
    got = logits(still, FedDPA.personal(shared, kept))
    if mix in (0.0, 1.0):
        assert torch.allclose(got, logits(still, local if mix else shared), atol=1e-5)
    factors = (logits(still, x) for x in (shared, local))
    assert mix != 0.4 or all(not torch.allclose(got, x, atol=1e-2) for x in factors)


@pytest.mark.parametrize("mix", [0.4, 0.05])
def test_a_step_of_the_dual_adapter_by_hand(still: Workspace, mix: float) -> None:
    shared, local, (rows,) = state(still, 1, 0.3), state(still, 2, 0.3), rows_of(still, 1)
    given = local.replace({**local.tensors, "feddpa.mix": torch.tensor(mix, dtype=torch.float64)})
    _, kept = take(still, FedDPA(mix=0.9, mix_lr=0.3), shared, given, lr=0.1, lr_last=0.1, steps=1, **SGD)
    g = gradient(still, mixture((mix, local), (1 - mix, shared)), rows)
    for module, rank in local.spec.ranks.items():
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        assert torch.allclose(kept[a], local[a] - 0.1 * g[a][:rank], atol=1e-6)
        assert torch.allclose(kept[b], local[b] - 0.1 * mix * g[b][:, :rank], atol=1e-6)
    ahead, behind = (loss_at(still, mixture((m, local), (1 - m, shared)), rows) for m in (mix + 0.001, mix - 0.001))
    assert float(kept["feddpa.mix"]) == pytest.approx(max(0.05, mix - 0.3 * (ahead - behind) / 0.002), abs=2e-3)


def test_the_fixed_half_does_not_move(still: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, local = state(still, 1), state(still, 2)
    given = local.replace({**local.tensors, "feddpa.mix": torch.tensor(0.25, dtype=torch.float64)})
    seen, step = list[AdapterState](), _Inside.step

    def spied(self: Any, work: Work, memory: Any) -> None:
        step(self, work, memory)
        seen.append(work.live.read(version=0))

    monkeypatch.setattr(_Inside, "step", spied)
    take(still, FedDPA(mix=0.5, mix_lr=0.0), shared, given, weight_decay=0.5)
    assert len(seen) == 3
    for module, rank in shared.spec.ranks.items():
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        assert all(torch.equal(s[a][rank:], shared[a]) and torch.allclose(s[b][:, rank:], 0.75 * shared[b]) for s in seen)


def test_a_state_without_its_number_is_one_sentence(still: Workspace) -> None:
    for turn, name in ((FedDPA(mix=0.5, mix_lr=0.0), "feddpa.mix"), (APFL(alpha=0.5, alpha_lr=0.0), "apfl.alpha")):
        with pytest.raises(CheckpointError, match=f"the client's stored state lacks '{name}': delete the state"):
            take(still, turn, state(still), state(still, 2))


def test_a_personal_adapter_that_diverged_is_an_error(still: Workspace) -> None:
    huge = state(still, 2).replace({n: 1e30 * t for n, t in state(still, 2).tensors.items()})
    with pytest.raises(UpdateError, match="the gradient of the personal adapter became nan in step 1: delete the state"):
        take(still, APFL(alpha=0.5, alpha_lr=0.1), state(still), with_alpha(huge, 0.5))


# -- FedDAT --------------------------------------------------------------------------------------------------------------------------------


def kl(wanted: Tensor, got: Tensor, t: float) -> Tensor:
    """T²·KL(wanted ‖ got), summed, by its definition."""
    p, q = torch.softmax(wanted / t, -1), torch.softmax(got / t, -1)
    return t**2 * (p * (p.log() - q.log())).sum()


def test_a_step_of_feddat_by_hand(still: Workspace) -> None:
    shared, local, (rows,) = state(still, 1, 0.3), state(still, 2, 0.3), rows_of(still, 1)
    sent, kept = take(still, FedDAT(temperature=3.0, weight=0.5), shared, local, lr=0.1, lr_last=0.1, steps=1, **SGD)
    batch = collate([still.examples("c0", "train")[i] for i in rows], still.pad_id)

    def descend(at: AdapterState, against: AdapterState) -> dict[str, Tensor]:
        still.live.load(against)
        with torch.no_grad():
            wanted, _ = counted_logits(still.live.model, batch, still.config.task)
        still.live.load(at)
        got, targets = counted_logits(still.live.model, batch, still.config.task)
        loss = torch.nn.functional.cross_entropy(got, targets, reduction="sum") + 0.5 * kl(wanted, got, 3.0)
        params = dict(still.live.parameters)
        found = dict(zip(params, torch.autograd.grad(loss / len(targets), list(params.values())), strict=True))
        return {n: found[n][tuple(map(slice, t.shape))] for n, t in at.tensors.items()}

    teacher = mixture((0.5, local), (0.5, shared))
    g = descend(shared, teacher)
    assert far(sent, shared.replace({n: t - 0.1 * g[n] for n, t in shared.tensors.items()})) < 1e-5
    g = descend(teacher, shared)  # with respect to the whole teacher
    for module, rank in local.spec.ranks.items():
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        assert torch.allclose(kept[a], local[a] - 0.1 * g[a][:rank], atol=1e-5)
        assert torch.allclose(kept[b], local[b] - 0.1 * 0.5 * g[b][:, :rank], atol=1e-5)
    assert torch.allclose(logits(still, FedDAT.personal(shared, local)), logits(still, teacher), atol=1e-6)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_feddat_survives_an_out_of_memory_error_anywhere(still: Workspace, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    shared, local, calls = state(still, 1, 0.3), state(still, 2, 0.3), itertools.count(1)
    expected = take(still, FedDAT(temperature=3.0, weight=1.0), shared, local, steps=1, **SGD)

    def limited(*given: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return training_logits(*given)

    monkeypatch.setattr("fedtune.clients.turns.feddat.training_logits", limited)
    got = take(still, FedDAT(temperature=3.0, weight=1.0), shared, local, steps=1, **SGD)
    assert all(far(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))


def test_feddat_takes_the_lean_step(still: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.models.lean import step_of

    live = still.live
    step, entered = step_of(live.model), list[int]()
    assert step is not None
    installed = type(step).installed

    def spied(self: Any, batch: Any) -> Any:
        entered.append(1)
        return installed(self, batch)

    monkeypatch.setattr(type(step), "installed", spied)
    take(still, FedDAT(temperature=3.0, weight=1.0), state(still), state(still, 2))
    assert len(entered) == 6  # two gradients in each of 3 steps


def test_feddat_without_distillation_and_equal_adapters(still: Workspace) -> None:
    plain, _ = take(still, Plain(), state(still), **SGD)
    sent, _ = take(still, FedDAT(temperature=3.0, weight=0.0), state(still), **SGD)
    assert far(sent, plain) < 1e-6
    # L starts from S, so that the first step's divergence and its gradient are 0
    one, _ = take(still, Plain(), state(still), steps=1, **SGD)
    sent, _ = take(still, FedDAT(temperature=3.0, weight=50.0), state(still), steps=1, **SGD)
    assert far(sent, one) < 1e-5


def averaged(*parts: tuple[float, AdapterState]) -> AdapterState:
    """The mean of A's and of B's, which is not the mixture of the products."""
    mean = {n: sum(c * p[n] for c, p in parts) for n in parts[0][1].tensors}
    padded = {n: torch.cat([t, 0 * t], 0 if n.endswith("A") else 1) for n, t in mean.items()}  # type: ignore[arg-type]
    return mixture(*parts).replace(padded)


WRONG: dict[str, tuple[Callable[[Workspace], None], str, Any]] = {
    "L has the gradient of the teacher's B": (
        test_a_step_of_feddat_by_hand,
        "feddat.of_first",
        lambda gradients, first, weight: of_first(gradients, first, 1.0),
    ),
    "factors are averaged": (lambda space: test_a_step_of_the_dual_adapter_by_hand(space, 0.4), "feddpa.mixture", averaged),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_turn_is_detected(still: Workspace, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    test, where, value = WRONG[name]
    monkeypatch.setattr(f"fedtune.clients.turns.{where}", value)
    with pytest.raises(AssertionError):
        test(still)

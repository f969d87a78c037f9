"""DiLoCo on numbers that can be checked by hand, against torch's SGD, and over other strategies."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.config import Config, PeftConfig
from fedtune.config.compose import choices, compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.rounds.find_strategy import make_strategy
from fedtune.strategies.diloco import DiLoCo
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedavgm import FedAvgM
from tests.strategies.updates import close, plain, random_adapter, reload, update

BEYOND = ("fedex", "hierfavg", "slora", "fedpeptao")  # more than the adapter changes
NEW_FACTORS = ("fedkseed", "flora", "flexlora", "fedsvd")


def check_by_hand() -> None:
    method = DiLoCo(lr=0.5, momentum=0.5)
    one = method.aggregate(1, method.start(plain(8.0)), [update("a", plain(1.0), 1), update("b", plain(5.0), 3)])
    # w̄ = (1 + 3·5) / 4 = 4, Δ = 8 − 4 = 4, v = 4, w = 8 − .5·(4 + .5·4) = 5
    assert one.adapter["w"].item() == 5.0 and one.memory["outer/w"].item() == 4.0
    two = method.aggregate(2, one, [update("a", plain(3.0))])
    # Δ = 5 − 3 = 2, v = .5·4 + 2 = 4, w = 5 − .5·(2 + .5·4) = 3
    assert two.adapter["w"].item() == 3.0 and two.memory["outer/w"].item() == 4.0


def test_two_rounds_by_hand() -> None:
    check_by_hand()


def plain_momentum(self: DiLoCo, before: ServerState, inner: ServerState) -> ServerState:
    """w − η·v: no look ahead."""
    deltas = {n: t.double() - inner.adapter[n].double() for n, t in before.adapter.tensors.items()}
    v = {n: self.momentum * before.memory.get(f"outer/{n}", torch.zeros(())) + d for n, d in deltas.items()}
    after = {n: (t.double() - self.lr * v[n]).to(t.dtype) for n, t in before.adapter.tensors.items()}
    return dataclasses.replace(inner, adapter=inner.adapter.replace(after), memory={f"outer/{n}": t for n, t in v.items()})


RIGHT = DiLoCo._step


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(plain_momentum, id="momentum without Nesterov"),
        pytest.param(lambda self, before, inner: RIGHT(self, dataclasses.replace(before, memory={}), inner), id="momentum forgotten"),
        pytest.param(lambda self, before, inner: inner, id="no outer step"),
    ],
)
def test_a_wrong_step_is_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiLoCo, "_step", wrong)
    with pytest.raises(AssertionError):
        check_by_hand()


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.0)])
def test_the_outer_step_is_torchs_sgd(lr: float, momentum: float) -> None:
    method, state = DiLoCo(lr=lr, momentum=momentum), ServerState(adapter=random_adapter(0))
    state = dataclasses.replace(state, adapter=state.adapter.replace({n: t.double() for n, t in state.adapter.tensors.items()}))
    theirs = {n: t.clone().requires_grad_() for n, t in state.adapter.tensors.items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for round in range(1, 5):
        adapters = [random_adapter(10 * round + i) for i in range(3)]
        mean = FedAvg().aggregate(round, state, [update(f"c{i}", a, 1 + i) for i, a in enumerate(adapters)]).adapter
        state = method.aggregate(round, state, [update(f"c{i}", a, 1 + i) for i, a in enumerate(adapters)])
        for n, t in theirs.items():
            t.grad = t.detach() - mean[n]
        optimizer.step()
        for n, t in theirs.items():
            torch.testing.assert_close(state.adapter[n], t.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("inner", ["fedavg", "fedavgm", "qfedavg", "hetlora", "lora_fair"])
def test_without_an_outer_step_it_is_the_inner_strategy_bit_for_bit(inner: str) -> None:
    method = DiLoCo(inner=inner, lr=1.0, momentum=0.0)
    alone: Strategy = type(method._within)()
    one, two = method.start(random_adapter(0)), alone.start(random_adapter(0))
    for round in (1, 2, 3):
        adapters = [random_adapter(10 * round + i, scale=1e-12 if round == 2 else 1.0) for i in range(3)]  # w − (w − w̄) loses their digits
        losses = {"start_loss": 1.0, "train_loss": 1.0}
        sent = [update(f"c{i}", a, 1 + i, metrics=losses, lr_sum=0.5, steps=3) for i, a in enumerate(adapters)]
        one, two = method.aggregate(round, one, sent), alone.aggregate(round, two, sent)
        assert all(torch.equal(one.adapter[n], t) for n, t in two.adapter.tensors.items())
        assert {n: t.tolist() for n, t in one.memory.items() if n[:6] != "outer/"} == {n: t.tolist() for n, t in two.memory.items()}


def test_the_mean_alone_gives_the_same_state() -> None:
    method, state = DiLoCo(), ServerState(adapter=random_adapter(0))
    mean = {n: t.double() for n, t in random_adapter(1).tensors.items()}
    one, two = method.aggregate_mean(1, state, mean), method.aggregate(1, state, [update("a", random_adapter(1))])
    assert close(one.adapter, two.adapter, 0) and one.memory.keys() == two.memory.keys()


def test_nobody_trains_one_client_and_identical_clients(tmp_path: Path) -> None:
    method = DiLoCo()
    start = ServerState(adapter=random_adapter(0))
    same = method.aggregate(1, start, [update("a", random_adapter(0)), update("b", random_adapter(0), 7)])
    assert all(torch.equal(same.adapter[n], t) for n, t in start.adapter.tensors.items())
    one, many = (method.aggregate(1, start, [update(c, random_adapter(1), 2) for c in names]) for names in ("a", "abc"))
    assert close(one.adapter, many.adapter)
    moved, other = ({n: t - start.adapter[n] for n, t in s.tensors.items()} for s in (one.adapter, random_adapter(1)))
    assert all(torch.allclose(moved[n], 0.7 * 1.9 * other[n], atol=1e-5) for n in moved)  # η·(1 + μ)·Δ in the first round
    saved = dataclasses.replace(one, memory=reload(one.memory, tmp_path))
    two = [method.aggregate(2, s, [update("a", random_adapter(2))]).adapter for s in (one, saved)]
    assert all(torch.equal(two[0][n], t) for n, t in two[1].tensors.items())


def test_clients_keep_their_optimizer_in_the_inner_strategys_plan() -> None:
    state = ServerState(adapter=random_adapter(0))
    plans = [Plan(round=3, client="a", base_version=2)]
    given = DiLoCo(inner="fedrot", settings={"share": 0.25}).plan(3, plans, state)["a"]
    assert given.plan.keep_optimizer and given.plan.turn == "fedrot" and given.plan.params == {"share": 0.25, "factor": "lora_A"}
    assert given.recombines
    assert not DiLoCo(keep_optimizer=False).plan(3, plans, state)["a"].plan.keep_optimizer


def test_the_inner_strategys_memory_and_notes_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedAvgM, "notes", lambda self, round, before, after: sorted({*before.memory, *after.memory}))
    method = DiLoCo(inner="fedavgm")
    one = method.aggregate(1, method.start(plain(0.0)), [update("a", plain(1.0))])
    assert set(one.memory) == {"momentum/w", "outer/w"} and method.notes(1, one, one) == ["momentum/w"]
    assert method.requirements == FedAvgM.requirements


@pytest.mark.parametrize("inner", [n for n in choices("strategy") if n not in (*BEYOND, *NEW_FACTORS, "diloco")])
def test_it_wraps_every_strategy_that_keeps_the_meaning_of_entries(inner: str) -> None:
    needs = {"krum": 7, "multikrum": 7, "bulyan": 7, "fedtrimmedavg": 7}.get(inner, 1)
    sgd = ["client.optimizer=sgd", "client.clip_norm=null"] if inner in ("scaffold", "fednova", "fedmezo") else []
    peft = ["peft=ravan"] if inner == "ravan" else []
    args = ["strategy=diloco", f"strategy.inner={inner}", f"min_clients={needs}", "inference=none", "devices=none", *sgd, *peft]
    method = make_strategy(compose(args)[0].config)
    assert isinstance(method, DiLoCo) and type(method._within).__module__ == f"fedtune.strategies.{inner}"


@pytest.mark.parametrize("inner", [*BEYOND, *NEW_FACTORS])
def test_others_are_refused_in_one_sentence(inner: str) -> None:
    settings = {"rounds": 9, "seed": 0} if inner == "slora" else {}
    peft = PeftConfig(method="ptuning_v2" if inner == "fedpeptao" else "lora")
    why = "changes more than the adapter's values" if inner in BEYOND else "computes new factors in every round"
    with pytest.raises(ConfigError, match=f"^strategy.inner={inner} {why}, so .*: set strategy.inner=fedavg$"):
        DiLoCo(inner=inner, settings=settings).check(Config(rounds=30, peft=peft))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inner": "fedavgg"}, "strategy.inner=fedavgg is not known: choose one of"),
        ({"inner": "diloco"}, "strategy.inner=diloco is not known"),
        ({"inner": "os"}, "strategy.inner=os is not known"),
        ({"settings": {"mu": 1.0}}, r"strategy.settings=\{'mu': 1.0\} does not fit strategy.inner=fedavg: .*'mu'"),
        ({"lr": 0.0}, "strategy.lr=0.0 is out of range"),
        ({"momentum": 1.0}, "strategy.momentum=1.0 is out of range"),
        ({"inner": "fedprox", "settings": {"mu": -1.0}}, "strategy.mu=-1.0 is out of range"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DiLoCo(**changes).check(Config())


def test_a_stale_or_partial_update_moves_only_its_tensors() -> None:
    """Tensors that clients do not send stay: their Δ is 0."""
    method, start = DiLoCo(), ServerState(adapter=random_adapter(0))
    part = random_adapter(1).subset(["q.lora_B"])
    after = method.aggregate(1, start, [Update(client="a", round=1, base_version=0, adapter=part, examples=1)]).adapter
    assert {n for n in after.tensors if not torch.equal(after[n], start.adapter[n])} == {"q.lora_B"}
    assert isinstance(after, AdapterState) and list(after.tensors) == list(start.adapter.tensors)


def test_the_momentum_leaves_a_factor_that_a_round_did_not_train() -> None:
    strategy = DiLoCo(inner="rolora", lr=0.7, momentum=0.9)
    state = strategy.start(random_adapter(0))
    for round in (1, 2, 3):
        given = strategy.plan(round, [Plan(round=round, client="a", base_version=round - 1)], state)["a"]
        names = matching(state.adapter.tensors, given.plan.send)
        sent = state.adapter.subset(names).replace({n: state.adapter[n] + 0.1 * round for n in names})
        after = strategy.aggregate(round, state, [update("a", sent)])
        assert {n for n in state.adapter.tensors if not torch.equal(after.adapter[n], state.adapter[n])} == set(names), round
        state = after


def test_an_inner_strategy_with_adapters_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="strategy.inner=hierfavg changes more than the adapter's values"):
        DiLoCo(inner="hierfavg").check(Config())


def test_an_entry_may_move_further_with_old_moments() -> None:
    kept, fresh = (
        DiLoCo(keep_optimizer=keep).plan(1, [Plan(round=1, client="a", base_version=0)], DiLoCo().start(random_adapter(0)))["a"]
        for keep in (True, False)
    )
    assert (kept.stretch, fresh.stretch) == (2.31, 1.0)
    # the largest step of AdamW for gradients g_t = b^(T - t): by Cauchy-Schwarz at b = β1 / β2
    b1, b2, steps = 0.9, 0.999, 20_000
    g = (b1 / b2) ** torch.arange(steps, dtype=torch.float64)  # the newest first
    powers = torch.arange(steps, dtype=torch.float64)
    ratio = (1 - b1) * (b1**powers * g).sum() / ((1 - b2) * (b2**powers * g**2).sum()).sqrt()
    assert float(ratio) == pytest.approx(kept.stretch * 3.16, rel=0.01)

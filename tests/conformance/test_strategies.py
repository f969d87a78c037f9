"""One matrix over every conf/strategy/*.yaml: the properties of every aggregation method.

The clients here have no model. What needs one (scores, sparse weights, per-layer prompts) is in test_matrix.py.
"""

import dataclasses
import importlib
import itertools
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord

from fedtune.config import Config, PeftConfig
from fedtune.config.compose import choices, compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.rounds.find_strategy import make_strategy
from tests.fakes import fake_bridge, fake_client_app, lora_state

NEED_A_MODEL = {
    "fedkseed": "its updates are coefficients of directions",
    "fedpeptao": "it scores layers, and its tensors are prompts",
    "slora": "its first stage trains the backbone's own weights",
}
NAMES = [n for n in choices("strategy") if n not in NEED_A_MODEL]
SERVER_STEPS = {  # strategy → why the new state is not the mean of the updates
    "fedadam": "normalized steps",
    "fedyogi": "normalized steps",
    "fedadagrad": "normalized steps",
    "qfedavg": "steps by the clients' losses",
    "diloco": "steps with Nesterov momentum",
}
NOT_ALONE = {  # rules that need several clients
    "krum": "tolerates malicious clients among several",
    "multikrum": "tolerates malicious clients among several",
    "bulyan": "tolerates malicious clients among several",
    "fedtrimmedavg": "trims the ends of several",
}
NEEDS = (
    {"ravan": ["peft=ravan"]}
    | {name: ["client.optimizer=sgd", "client.clip_norm=null"] for name in ("scaffold", "fednova")}
    | {name: ["min_clients=7"] for name in ("krum", "multikrum", "bulyan", "fedtrimmedavg")}
)
START = lora_state()
NEEDS_ZERO = {"feddat", "feddpa", "fedsa", "hetlora", "slora"}  # a product B·A = 0 before round 1
KEEP_TENSORS = {"fedper", "fedrep", "fedsa"}  # clients keep tensors, which the server never gets
CONF = Path(__file__).parents[2] / "conf" / "strategy"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def strategy(name: str) -> Strategy:
    return strategy_of(name)


@lru_cache
def strategy_of(name: str) -> Strategy:
    return make_strategy(compose([f"strategy={name}", "inference=none", *NEEDS.get(name, [])])[0].config)


def updates(strategy: Strategy, state: ServerState, counts: list[int], round: int = 1) -> tuple[list[Update], list[AdapterState]]:
    """Clients that change their trained tensors by a random step: (their updates, all their tensors)."""
    plans = [Plan(round=round, client=f"c{i}", base_version=0) for i in range(len(counts))]
    assignments, sent_updates, own = strategy.plan(round, plans, state), [], []
    for i, n in enumerate(counts):
        plan, sent, noise = assignments[f"c{i}"].plan, assignments[f"c{i}"].adapter, lora_state(seed=i + 1)
        begin = sent.replace({**START.tensors, **sent.tensors})
        trained = {k: begin[k] + 0.1 * noise[k] for k in matching(begin.tensors, plan.train)}
        own.append(begin.replace({**begin.tensors, **trained}))
        sent_updates.append(
            Update(
                client=f"c{i}",
                round=round,
                base_version=0,
                adapter=own[-1].subset(matching(sent.tensors, plan.send)),
                examples=n,
                metrics={"train_loss": 1.0 + i, "start_loss": 2.0 + i},
                measurements={"steps": 3, "lr_sum": 0.3},
            )
        )
    return sent_updates, own


def product(adapter: AdapterState, shifts: tuple[AdapterState, ...] = ()) -> torch.Tensor:
    """The effect of an adapter: what each module adds to the loaded weights, and the head."""
    parts = [adapter["head.weight"].flatten()]
    for module in adapter.spec.ranks:
        parts.append(sum(s.spec.scaling[module] * s[f"{module}.lora_B"] @ s[f"{module}.lora_A"] for s in (adapter, *shifts)).flatten())  # type: ignore[union-attr]
    return torch.cat(parts)


def whole(state: ServerState) -> torch.Tensor:
    return product(state.adapter, state.shifts)


def snapshot(state: ServerState) -> dict[str, torch.Tensor]:
    shifts = {f"shift {s.spec.version} {n}": t for s in state.shifts for n, t in s.tensors.items()}
    memory = {f"memory {n}": t for n, t in state.memory.items()}
    return {n: t.clone() for n, t in {**state.adapter.tensors, **memory, **shifts}.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_one_client_is_the_identity(name: str, strategy: Strategy) -> None:
    state = strategy.start(START)
    (alone,), (own,) = updates(strategy, state, [5])
    # robust rules accept an update only if enough other clients sent a similar one
    many = [dataclasses.replace(alone, client=f"c{i}") for i in range(7 if name in NOT_ALONE else 1)]
    after = strategy.aggregate(1, state, iter(many))
    if name in KEEP_TENSORS:
        assert all(torch.allclose(after.adapter[n], t) for n, t in alone.adapter.tensors.items())
        return
    assert torch.allclose(whole(after), product(own), atol=1e-6) != (name in SERVER_STEPS), SERVER_STEPS.get(name)


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4, 4, 4, 4), (1, 1, 1, 4, 4, 4, 4), (1, 2, 3, 1, 2, 1, 1)])
def test_without_training_nothing_changes(name: str, strategy: Strategy, ranks: tuple[int, ...]) -> None:
    if len(set(ranks)) > 1 and not strategy.requirements.mixes_ranks:
        pytest.skip("takes clients of one rank")
    state = begin = strategy.start(wide())
    for round in (1, 2, 3):
        plans = [Plan(round=round, client=f"c{i}", base_version=round - 1, rank=r) for i, r in enumerate(ranks)]
        assignments = strategy.plan(round, plans, state)
        replies = [
            Update(
                client=p.client,
                round=round,
                base_version=round - 1,
                adapter=assignments[p.client].adapter.subset(
                    matching(assignments[p.client].adapter.tensors, assignments[p.client].plan.send)
                ),
                examples=1 + 3 * i,
                metrics={"train_loss": 1.0, "start_loss": 1.0},
                measurements={"steps": 3, "lr_sum": 0.3},
            )
            for i, p in enumerate(plans)
        ]
        state = strategy.aggregate(round, state, iter(replies))
    assert torch.allclose(whole(state), whole(begin), atol=1e-5)


def wide() -> AdapterState:
    """An adapter of rank 4 that changes the weights: B is not 0."""
    gen, base = torch.Generator().manual_seed(5), lora_state(seed=5)
    tensors = dict(base.tensors)
    for module, rows, columns in (("q", 3, 5), ("up", 7, 3)):
        tensors[f"{module}.lora_A"] = torch.randn(4, columns, generator=gen)
        tensors[f"{module}.lora_B"] = torch.randn(rows, 4, generator=gen)
    return base.replace(tensors, ranks={"q": 4, "up": 4})


def test_identical_clients_are_one_client(name: str, strategy: Strategy) -> None:
    state = strategy.start(START)
    (alone,), _ = updates(strategy, state, [5])
    many = [dataclasses.replace(alone, client=f"c{i}") for i in range(8)]
    one = many[:1] if name not in NOT_ALONE else many[:7]
    after, expected = strategy.aggregate(1, state, iter(many)), strategy.aggregate(1, state, iter(one))
    assert torch.allclose(whole(after), whole(expected), atol=1e-6)


def test_order_does_not_matter(strategy: Strategy) -> None:
    state = strategy.start(START)
    replies, _ = updates(strategy, state, [1, 7, 40, 2, 2, 5, 11])
    results = [whole(strategy.aggregate(1, state, iter([*p, *replies[3:]]))) for p in itertools.permutations(replies[:3])]
    assert all(torch.allclose(r, results[0], atol=1e-5) for r in results) and len(results) == math.factorial(3)


def test_inputs_are_untouched(strategy: Strategy) -> None:
    state = strategy.start(START)
    for round in (1, 2):
        replies, _ = updates(strategy, state, [1, 7, 3, 3, 3, 3, 3], round)
        before, sent = snapshot(state), [[t.clone() for t in u.adapter.tensors.values()] for u in replies]
        after = strategy.aggregate(round, state, iter(replies))
        assert same(before, snapshot(state))
        for update, tensors in zip(replies, sent, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(update.adapter.tensors.values(), tensors, strict=True))
        state = after


@pytest.mark.parametrize("name", choices("strategy"))
def test_mixed_ranks_are_mixed_or_refused(name: str) -> None:
    method = ["peft=ptuning_v2", "rounds=30"] if name == "fedpeptao" else []
    config = compose([f"strategy={name}", *NEEDS.get(name, []), *method])[0].config
    config.devices.classes["phone"].rank = 2
    if name in ("flora", "flexlora", "hetlora"):
        state = make_strategy(config).start(START)
        assignments = make_strategy(config).plan(
            1, [Plan(round=1, client=c, base_version=0, rank=r) for c, r in (("a", 1), ("b", None))], state
        )
        assert [assignments[c].adapter["q.lora_A"].shape[0] for c in "ab"] == [1, 2]
        return
    with pytest.raises(
        ConfigError, match=r"needs the same rank on all clients: leave out devices.classes.\*.rank, or take a strategy that mixes ranks"
    ):
        make_strategy(config)


@pytest.mark.parametrize("name", choices("strategy"))
def test_a_strategy_that_assumes_a_zero_product_refuses_loftq(name: str) -> None:
    method = ["peft=ptuning_v2", "rounds=30"] if name == "fedpeptao" else []
    config = compose([f"strategy={name}", *NEEDS.get(name, []), *method])[0].config
    config.peft.init, message = "loftq", ""
    try:
        make_strategy(config)
    except ConfigError as bad:
        message = str(bad)
    assert ("assumes B·A = 0 before round 1, but peft.init=loftq starts elsewhere" in message) == (name in NEEDS_ZERO)


def class_of(name: str) -> type[Strategy]:
    module, _, kind = str(yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))["_target_"]).rpartition(".")
    return getattr(importlib.import_module(module), kind)


def test_entries_keep_their_meaning_if_a_strategy_declares_it() -> None:
    """Error feedback relies on it: without training, no entry changes in 2 rounds."""
    for name in NAMES:
        strategy = class_of(name)()
        state = begin = strategy.start(wide())
        for round in (1, 2):
            plans = [Plan(round=round, client=f"c{i}", base_version=round - 1) for i in range(7)]
            sent = {c: a.adapter.subset(matching(a.adapter.tensors, a.plan.send)) for c, a in strategy.plan(round, plans, state).items()}
            reported: dict[str, Any] = {"metrics": {"train_loss": 1.0, "start_loss": 1.0}, "measurements": {"steps": 3, "lr_sum": 0.3}}
            replies = [Update(client=c, round=round, base_version=round - 1, adapter=a, examples=2, **reported) for c, a in sent.items()]
            state = strategy.aggregate(round, state, iter(replies))
        kept = all(torch.allclose(state.adapter[n], t, atol=1e-5) for n, t in begin.adapter.tensors.items())
        assert kept or not strategy.requirements.keeps_basis, name


def test_no_strategy_loses_what_it_supports() -> None:
    """A strategy that does not declare its properties is safe, but refuses stacked experts and error feedback."""
    each = {name: class_of(name).requirements for name in choices("strategy")}
    averages, keeps = {n for n, r in each.items() if r.averages_entries}, {n for n, r in each.items() if r.keeps_basis}
    assert averages >= {
        "fedadagrad", "fedadam", "fedavg", "fedavgm", "fedmedian", "fednova", "fedprox", "fedsa", "fedtrimmedavg", "fedyogi", "ffa",
        "qfedavg", "rolora", "scaffold",
    }  # fmt: skip
    assert keeps >= averages | {"bulyan", "fedex", "fedpeptao", "hetlora", "krum", "lora_fair", "multikrum", "slora"}
    assert {n for n, r in each.items() if r.assumes_zero_init} == NEEDS_ZERO


def test_no_setting_exceeds_the_range_of_its_formula() -> None:
    """Tries the least value above and the greatest below each range; negative and non-numeric values have their own test."""
    prompts = Config(rounds=30, peft=PeftConfig(method="ptuning_v2"), strategy={"_target_": "fedtune.strategies.fedpeptao.FedPepTAO"})
    out: dict[str, dict[str, float]] = {
        "fedadam": {"beta_1": 1.0, "beta_2": 1.0, "lr": 0.0, "tau": 0.0},
        "fedyogi": {"beta_1": 1.0, "beta_2": 1.0, "lr": 0.0, "tau": 0.0},
        "fedadagrad": {"lr": 0.0, "tau": 0.0},
        "fedavgm": {"momentum": 1.0, "lr": 0.0},
        "diloco": {"momentum": 1.0, "lr": 0.0},
        "fedrot": {"share": 1.001},
        "fedtrimmedavg": {"beta": 0.5},
        "multikrum": {"select": 0},
        "hetlora": {"tail_share": 1.0},
        "lora_fair": {"ridge": 0.0},
        "qfedavg": {"lr": 0.0},
        "scaffold": {"lr": 0.0},
        "slora": {"sparse_share": 1.01, "density": 0.0},
        "fedpeptao": {"momentum": 1.0, "ratio": 0.0, "score_rows": 1},
    }
    for name, values in out.items():
        given, config = ({"rounds": 9, "seed": 0} if name == "slora" else {}), prompts if name == "fedpeptao" else Config(rounds=9)
        for field, value in values.items():
            with pytest.raises(ConfigError, match=rf"^strategy\.{field}={value} (is out of range: it )?must be "):
                class_of(name)(**given, **{field: value}).check(config)
    for name, field in (("slora", "density"), ("slora", "sparse_share"), ("fedpeptao", "ratio")):  # the range ends at 1
        given, config = ({"rounds": 9, "seed": 0} if name == "slora" else {}), prompts if name == "fedpeptao" else Config(rounds=9)
        class_of(name)(**given, **{field: 1.0}).check(config)
        with pytest.raises(ConfigError, match=f"strategy.{field}=1.001 is out of range"):
            class_of(name)(**given, **{field: 1.001}).check(config)


def test_every_client_gets_its_own_assignment(strategy: Strategy) -> None:
    state = strategy.start(START)
    assignments = strategy.plan(3, [Plan(round=3, client=c, base_version=2) for c in ("a", "b")], state)
    assert sorted(assignments) == ["a", "b"] and all(assignments[c].plan.client == c for c in assignments)


def test_memory_survives_a_checkpoint_and_bad_updates_are_dropped(strategy: Strategy, tmp_path: Path) -> None:
    def rot(round: int, arrays: Any, text: str) -> Any:
        name = list(arrays)[-1]
        return ArrayRecord({**arrays, name: Array(torch.full(tuple(arrays[name].shape), math.nan))}), text

    def run(path: Path, rounds: int) -> tuple[ServerState, list[dict[str, Any]]]:
        clients = fake_client_app({c: 1 + i for i, c in enumerate("abcdefghi")}, {"b": rot})
        config = Config(rounds=rounds, clients_per_round=9)
        bridge, observer = fake_bridge(path, clients, 9, config, strategy=strategy)
        try:
            return bridge.loop(), observer.records
        finally:
            bridge.run.close()

    expected, records = run(tmp_path / "whole", 3)
    assert [r["dropped"] for r in records[1:]] == [{"refused": 1}] * 3
    run(tmp_path / "part", 1)
    actual, _ = run(tmp_path / "part", 3)
    assert same(snapshot(expected), snapshot(actual))


@pytest.mark.parametrize("name", choices("strategy"))
def test_a_negative_or_non_numeric_setting_is_refused_by_name(name: str) -> None:
    """No setting of a method may be negative or non-numeric; `rounds` and `seed` belong to the run, which checks them."""
    method = ["peft=ptuning_v2", "rounds=30"] if name == "fedpeptao" else []
    config = compose([f"strategy={name}", "inference=none", "devices=none", *NEEDS.get(name, []), *method])[0].config
    strategy: Any = make_strategy(config)  # a dataclass, as all are
    settings = {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy) if f.init and f.name not in ("rounds", "seed")}
    for field in (n for n, value in settings.items() if type(value) in (int, float)):
        for bad in (-1, math.nan):
            with pytest.raises(ConfigError, match=rf"^strategy\.{field}={bad} (is out of range: it )?must be "):
                dataclasses.replace(strategy, **{field: bad}).check(config)


@pytest.mark.parametrize("name", choices("strategy"))
def test_the_class_and_its_yaml_have_the_same_defaults(name: str) -> None:
    method = ["peft=ptuning_v2", "rounds=30"] if name == "fedpeptao" else []
    config = compose([f"strategy={name}", "inference=none", "devices=none", *NEEDS.get(name, []), *method])[0].config
    strategy: Any = make_strategy(config)
    fields = [f for f in dataclasses.fields(strategy) if f.default is not dataclasses.MISSING]
    assert {f.name: getattr(strategy, f.name) for f in fields} == {f.name: f.default for f in fields}


def test_strategies_that_average_entries_do_not_depend_on_their_order(name: str, strategy: Strategy) -> None:
    """Stacked experts rely on it: the entries of their factors are in another order than those of other factors."""
    if not strategy.requirements.averages_entries:
        pytest.skip("it computes with products of factors")

    def reorder(state: AdapterState) -> AdapterState:
        draws = {n: torch.Generator().manual_seed(i) for i, n in enumerate(START.tensors)}
        orders = {n: torch.randperm(t.numel(), generator=draws[n]) for n, t in state.tensors.items()}
        return state.replace({n: t.flatten()[orders[n]].view(t.shape) for n, t in state.tensors.items()})

    state = strategy.start(START)
    sent, _ = updates(strategy, state, [3, 1, 4, 1, 5, 9, 2])
    result = strategy.aggregate(1, state, sent)
    after = result.adapter
    assert not result.shifts  # shifts are products
    other = strategy.aggregate(
        1, strategy.start(reorder(START)), [dataclasses.replace(u, adapter=reorder(u.adapter)) for u in sent]
    ).adapter
    for n, tensor in reorder(after).tensors.items():
        torch.testing.assert_close(other[n], tensor, atol=1e-6, rtol=1e-5, msg=n)

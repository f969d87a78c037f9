"""User-level privacy around strategies: what they see, its cost, excluded clients, and the state kept over restarts."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedtune.config import Config, PrivacyConfig
from fedtune.config.compose import choices, compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update, matching
from fedtune.contracts.strategy import ServerState, Strategy
from fedtune.errors import ConfigError
from fedtune.exchange import CentralDP, make_exchange
from fedtune.privacy.accounting import Spend, epsilon
from fedtune.privacy.ledger import Ledger, ledger_file
from fedtune.rounds.find_strategy import make_strategy
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.fedmedian import FedMedian
from tests.exchange.channel import FixedChannel
from tests.fakes import fake_bridge, fake_client_app, lora_state

ROOT = Path(__file__).parents[2]
LOUD = {"kind": "user", "clip": 1e6, "noise": 1e-15, "epsilon": None}  # practically no privacy, so that the arithmetic is exact


def config(rounds: int = 1, cohort: int = 10, **privacy: Any) -> Config:
    return Config(rounds=rounds, clients_per_round=cohort, privacy=PrivacyConfig(**{"kind": "user", **privacy}))


def run(path: Path, run_config: Config, clients: dict[str, int], strategy: Strategy | None = None) -> tuple[ServerState, Any]:
    exchange = make_exchange(run_config, len(clients), path / "privacy")
    at, observer = fake_bridge(path / "r", fake_client_app(clients), len(clients), run_config, strategy=strategy, exchange=exchange)
    return at.loop(), observer


def strategies() -> list[Strategy]:
    """One of each strategy, with the settings of its YAML."""
    results = []
    for name in choices("strategy"):
        args = yaml.safe_load((ROOT / "conf/strategy" / f"{name}.yaml").read_text(encoding="utf-8"))
        args.pop("defaults", None)
        module, _, kind = args.pop("_target_").rpartition(".")
        results.append(getattr(importlib.import_module(module), kind)(**args))
    return results


def update(client: str, adapter: AdapterState, examples: int = 5) -> Update:
    return Update(
        client=client, round=1, base_version=0, adapter=adapter, examples=examples, metrics={"train_loss": 1.0, "start_loss": 1.0},
        measurements={"steps": 3, "lr_sum": 0.3},
    )  # fmt: skip


ALL = {type(s).__name__: s for s in strategies()}


@pytest.mark.parametrize("name", [n for n, s in ALL.items() if s.requirements.needs_only_mean])
def test_a_strategy_on_means_gets_only_the_mean(name: str) -> None:
    strategy, base = ALL[name], lora_state(seed=3)
    state = strategy.start(base)
    for round in (1, 2):  # the second round has the strategy's memory
        assignments = strategy.plan(round, [Plan(round=round, client=c, base_version=0) for c in "abc"], state)
        send = assignments["a"].plan.send
        sent = [base.replace({n: t + k for n, t in state.adapter.subset(matching(base.tensors, send)).tensors.items()}) for k in (1, 2, 6)]
        mean = {n: torch.stack([s[n].double() for s in sent]).mean(0) for n in sent[0].tensors}
        many = strategy.aggregate(round, state, [update(c, s) for c, s in zip("abc", sent, strict=True)])
        one = strategy.aggregate_mean(round, state, mean)
        for n, t in many.adapter.tensors.items():
            torch.testing.assert_close(one.adapter[n], t, rtol=1e-4, atol=1e-5)
        state = many


def test_a_strategy_that_needs_each_update_is_not_marked() -> None:
    assert {n for n, s in ALL.items() if s.requirements.needs_only_mean} == {
        "APFL", "Ditto", "FedAvg", "FedDAT", "FedDPA", "FedPer", "FedRep", "PFedMe", "FedMeZO", "FedProx",
        "FedAvgM", "DiLoCo", "FedRot", "RAVAN", "FedAdam", "FedYogi", "FedAdagrad", "FFA", "RoLoRA", "FedSA", "FedSVD", "FwdLLM"
    }  # fmt: skip
    median, state = FedMedian(), ServerState(adapter=lora_state(fill=0.0))
    sent = [lora_state(fill=float(k)) for k in (1, 2, 6)]  # median 2, mean 3
    many = median.aggregate(1, state, [update(c, s) for c, s in zip("abc", sent, strict=True)])
    assert float(many.adapter["head.weight"][0, 0]) == 2.0


@pytest.mark.parametrize("name", ["fedmedian", "flora", "scaffold"])
def test_a_strategy_that_needs_each_update_is_refused(name: str) -> None:
    command = (ROOT / "conf/strategy" / f"{name}.yaml").read_text().splitlines()[0]
    words = command.split("python -m fedtune.sim ")[1].split()
    with pytest.raises(ConfigError, match="privacy=user reveals only a noised mean"):
        make_strategy(compose([*words, "privacy=user"])[0].config)


@pytest.mark.parametrize("name", ["slora", "qfedavg", "fedpeptao"])
def test_extra_disclosure_is_refused(name: str) -> None:
    command = (ROOT / "conf/strategy" / f"{name}.yaml").read_text().splitlines()[0]
    words = command.split("python -m fedtune.sim ")[1].split()
    with pytest.raises(ConfigError, match="which privacy=record does not cover"):
        make_strategy(compose([*words, "privacy=record"])[0].config)


def test_without_noise_and_clip_it_is_the_uniform_mean(tmp_path: Path) -> None:
    state, _ = run(tmp_path, config(**LOUD), {"a": 1, "b": 3, "c": 11})
    # by hand: (1 + 3 + 11) / 3 = 5 for any row counts; weighted by them it would be (1 + 9 + 121) / 15
    for t in state.adapter.tensors.values():
        torch.testing.assert_close(t, torch.full_like(t, 5.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FFA", "RoLoRA", "FedSVD"])
def test_strategies_run_and_keep_their_memory(tmp_path: Path, name: str) -> None:
    run_config = config(3, 2, clip=0.5, noise=0.3, epsilon=None, adaptive=True, bit_noise=0.4)
    state, observer = run(tmp_path, run_config, {"a": 1, "b": 3, "c": 11}, ALL[name])
    assert state.adapter.spec.version == 3 and [r["counted"] for r in observer.records[1:]] == [2, 2, 2]
    clips = [r["dp_clip"] for r in observer.records[1:]] + [float(state.exchange["clip"])]
    assert clips[0] == 0.5 and len(set(clips)) == 4


def test_the_clip_bounds_a_client_s_influence(tmp_path: Path) -> None:
    run_config = config(clip=0.25, noise=1e-12, epsilon=None)
    with_, _ = run(tmp_path / "a", run_config, {"a": 1, "b": 3, "c": 900})
    without, _ = run(tmp_path / "b", dataclasses.replace(run_config, clients_per_round=3), {"a": 1, "b": 3, "c": 1})
    apart = torch.cat([(with_.adapter[n] - without.adapter[n]).flatten() for n in with_.adapter.tensors]).norm()
    # both of c's updates point the same way and are longer than C: clipped, they are the same
    assert float(apart) <= 1e-6
    assert float(torch.cat([t.flatten() for t in with_.adapter.tensors.values()]).norm()) == pytest.approx(0.25, rel=1e-5)


def test_each_client_pays_for_the_rounds_in_which_it_counts(tmp_path: Path) -> None:
    state, observer = run(tmp_path, config(6, 2, clip=1.0, noise=2.0, epsilon=None), {"a": 1, "b": 3, "c": 11, "d": 2})
    for client in "abcd":
        turns = [r for r in observer.clients if r["client"] == client and r["round"] and "dropped" not in r and "steps" in r]
        assert Ledger(ledger_file(tmp_path / "privacy", client)).spent() == [Spend(noise=2.0, rate=1.0, steps=1)] * len(turns)
    spent = [r["epsilon"] for r in observer.records[1:]]
    most = max(len(Ledger(ledger_file(tmp_path / "privacy", c)).spent()) for c in "abcd")
    assert spent == sorted(spent) and spent[-1] == epsilon([Spend(noise=2.0, rate=1.0, steps=most)], 1e-5)


def test_a_client_without_budget_is_excluded_and_the_run_continues(tmp_path: Path) -> None:
    clients = {"a": 1, "b": 3}
    run_config = config(4, 1, clip=1.0, epsilon=2.0, turns=1)
    _, observer = run(tmp_path, run_config, clients)
    why = [r["dropped"] for r in observer.clients if "dropped" in r]
    assert sum(r["counted"] for r in observer.records[1:]) == 2 and len(why) == 2  # one turn for each client
    assert all(w.startswith("privacy: another turn would cost ε = ") and "privacy.epsilon=2" in w for w in why)
    assert max(r.get("epsilon", 0.0) for r in observer.records) <= 2.0


def test_a_round_repeated_after_a_kill_is_paid_again(tmp_path: Path) -> None:
    run_config = config(2, 2, clip=1.0, noise=2.0, epsilon=None)
    run(tmp_path, run_config, {"a": 1, "b": 3})
    exchange = make_exchange(run_config, 2, tmp_path / "privacy")
    assert isinstance(exchange, CentralDP)
    state = ServerState(adapter=lora_state(fill=0.0), exchange=exchange.start())
    sent = FixedChannel([update("a", lora_state(fill=1.0))])
    again = exchange.run(2, state, FedAvg(), sent)
    assert len(Ledger(ledger_file(tmp_path / "privacy", "a")).spent()) == 3
    # and the same round draws the same noise
    twice = exchange.run(2, state, FedAvg(), sent)
    assert all(torch.equal(t, twice.adapter[n]) for n, t in again.adapter.tensors.items())
    secure = dataclasses.replace(exchange, privacy=dataclasses.replace(exchange.privacy, secure_rng=True))
    fresh = secure.run(2, state, FedAvg(), sent)
    assert not torch.equal(fresh.adapter["head.weight"], again.adapter["head.weight"])


def test_costs_are_recorded_before_the_strategy_sees_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = make_exchange(config(clip=1.0, noise=2.0, epsilon=None), 2, tmp_path)
    monkeypatch.setattr(FedAvg, "aggregate_mean", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        state = ServerState(adapter=lora_state(fill=0.0), exchange=exchange.start())
        exchange.run(1, state, FedAvg(), FixedChannel([update("a", lora_state(fill=1.0))]))
    assert len(Ledger(ledger_file(tmp_path, "a")).spent()) == 1


def test_too_little_noise_on_the_bits_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="raise privacy.bit_noise"):
        make_exchange(config(2, 2, noise=2.0, adaptive=True), 2, tmp_path)

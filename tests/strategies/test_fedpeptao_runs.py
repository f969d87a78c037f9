"""FedPepTAO: restarts, settings, and runs through bridge, messages and a model. test_fedpeptao.py tests its rule."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.clients.app import make_client_app
from fedtune.clients.host import ClientHost
from fedtune.clients.store import Storage
from fedtune.clients.workspace import workspace
from fedtune.config import ClientConfig, Config, EvalConfig, PeftConfig, TaskConfig, TrafficConfig, to_dict
from fedtune.config.compose import compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan, Update
from fedtune.contracts.strategy import Assignment, ServerState
from fedtune.errors import ConfigError
from fedtune.rounds.find_strategy import make_strategy
from fedtune.runs.directory import RunDirectory
from fedtune.strategies.fedpeptao import FedPepTAO
from tests.fakes import RecordingObserver, fake_bridge
from tests.strategies.test_fedpeptao import one_round, reply, run
from tests.tiny import tiny_config

# -- properties of every strategy ---------------------------------------------------------------------------------------------------------

COHORTS = [{"a": 1, "b": 7, "c": 40}, {"a": 1, "c": 40}, {"b": 7, "c": 40}, {"a": 1, "b": 7}, *[{"a": 1, "b": 7, "c": 40}] * 3]


def same(a: ServerState, b: ServerState, atol: float = 0.0) -> bool:
    tensors = ((x.adapter.tensors, x.memory) for x in (a, b))
    (first, kept), (second, other) = tensors
    pairs = [(first[n], second[n]) for n in first] + [(kept[n], other[n]) for n in kept]
    return first.keys() == second.keys() and kept.keys() == other.keys() and all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in pairs)


@pytest.mark.parametrize("variant", ["scaled", "paper", "code"])
@pytest.mark.parametrize("stop", range(8))
def test_a_restart_continues_with_the_same_bits(tmp_path: Path, variant: str, stop: int) -> None:
    strategy = FedPepTAO(warmup_rounds=2, variant=variant)
    whole = run(strategy, COHORTS)
    stopped = whole[stop]
    stopped.adapter.save(tmp_path / "adapter.safetensors")
    save_file(dict(stopped.memory), tmp_path / "memory.safetensors")
    state = ServerState(adapter=AdapterState.load(tmp_path / "adapter.safetensors"), memory=load_file(tmp_path / "memory.safetensors"))
    for round in range(stop + 1, len(COHORTS) + 1):
        state, _ = one_round(strategy, round, state, COHORTS[round - 1])
    assert same(state, whole[-1]) and strategy.phase(state) == "partial" and "v/score.weight" in state.memory


@pytest.mark.parametrize("variant", ["scaled", "paper", "code"])
@pytest.mark.parametrize("round", range(1, 8))
def test_order_does_not_matter_and_inputs_are_untouched(variant: str, round: int) -> None:
    strategy = FedPepTAO(warmup_rounds=2, variant=variant)
    state = run(strategy, COHORTS[: round - 1])[-1]
    assignments = strategy.plan(round, [Plan(round=round, client=c, base_version=0) for c in "abc"], state)
    updates = [reply(assignments[c], n) for c, n in (("a", 1), ("b", 7), ("c", 40))]
    before = [t.clone() for s in (state.adapter.tensors, state.memory, *(u.adapter.tensors for u in updates)) for t in s.values()]
    first, *others = (strategy.aggregate(round, state, iter(p)) for p in itertools.permutations(updates))
    assert all(same(first, other, atol=1e-6) for other in others)
    after = [t for s in (state.adapter.tensors, state.memory, *(u.adapter.tensors for u in updates)) for t in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("settings", "rounds", "method", "sentence"),
    [
        ({}, 30, "lora", "fedpeptao exchanges one prompt a layer, peft.method=lora has none: set peft=ptuning_v2"),
        ({}, 22, "ptuning_v2", "selects layers after 22 rounds of warm-up and scoring, but rounds=22: raise rounds"),
        ({"ratio": 0.0}, 30, "ptuning_v2", "strategy.ratio=0.0 is out of range: it must be greater than 0"),
        ({"order": "code"}, 30, "ptuning_v2", "strategy.order=code is not known"),
        ({"variant": "x"}, 30, "ptuning_v2", "strategy.variant=x is not known"),
        ({"momentum": 1.0}, 30, "ptuning_v2", "strategy.momentum=1.0 is out of range"),
        ({"score_rows": 1}, 30, "ptuning_v2", "strategy.score_rows=1 is out of range"),
        ({"server_lr": math.nan}, 30, "ptuning_v2", "strategy.server_lr=nan is out of range"),
        ({"warmup_rounds": -1}, 30, "ptuning_v2", "strategy.warmup_rounds=-1 is out of range"),
    ],
)
def test_invalid_settings_give_a_one_sentence_error(settings: dict[str, Any], rounds: int, method: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        FedPepTAO(**settings).check(Config(rounds=rounds, peft=PeftConfig(method=method)))


@pytest.mark.parametrize("traffic", [TrafficConfig(up="int8"), TrafficConfig(topk=0.01)])
def test_compressed_updates_are_refused_for_the_drift(traffic: TrafficConfig) -> None:
    config = Config(rounds=23, peft=PeftConfig(method="ptuning_v2"), traffic=traffic)
    with pytest.raises(ConfigError, match="set traffic.up=fp32 traffic.topk=null, or strategy.server_lr=0"):
        FedPepTAO().check(config)
    FedPepTAO(server_lr=0.0).check(config)  # as the error advises: with server_lr=0 no drift is needed


def test_valid_settings_pass() -> None:
    FedPepTAO().check(Config(rounds=23, peft=PeftConfig(method="ptuning_v2")))
    FedPepTAO(ratio=1.0, warmup_rounds=0).check(Config(rounds=1, peft=PeftConfig(method="ptuning_v2")))


@pytest.mark.parametrize(("rounds", "warmup"), [(30, 21), (20, 14), (8, 5)])
def test_most_of_a_run_trains_all_layers(rounds: int, warmup: int) -> None:
    config = compose(["strategy=fedpeptao", "peft=ptuning_v2", f"rounds={rounds}"])[0].config
    assert config.strategy["warmup_rounds"] == warmup  # ⌊.7 · 30⌋, ⌊.7 · 20⌋, ⌊.7 · 8⌋
    make_strategy(config)  # it would refuse a run that ends before the partial rounds


# -- complete runs: bridge, messages, ClientApp, a model ----------------------------------------------------------------------------------


class RecordingFedPepTAO(FedPepTAO):
    """Records the assignment and the update of each client."""

    def plan(self, round: int, plans: Sequence[Plan], state: ServerState) -> Mapping[str, Assignment]:
        assignments = super().plan(round, plans, state)
        SENT[round] = {
            c: list(a.adapter.tensors) for c, a in assignments.items()
        }  # the evaluation before the round also plans for all clients
        return assignments

    def aggregate(self, round: int, state: ServerState, updates: Iterable[Update]) -> ServerState:
        known = list(updates)
        CAME[round] = {u.client: list(u.adapter.tensors) for u in known}
        return super().aggregate(round, state, iter(known))


SENT: dict[int, dict[str, list[str]]] = {}
CAME: dict[int, dict[str, list[str]]] = {}


def federate(path: Path, config: Config, strategy: FedPepTAO) -> tuple[ServerState, RecordingObserver]:
    space = workspace(json.dumps(to_dict(config)))
    app = make_client_app(ClientHost(config, Storage.in_folder(path / "clients", config), loaded=space))
    bridge, observer = fake_bridge(path, app, len(space.client_ids), config, strategy=strategy, initial=space.initial)
    state = dataclasses.replace(bridge, evaluate=None, metric=("accuracy", True)).loop()
    bridge.run.close()
    return state, observer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(
        tmp_path_factory.mktemp("fedpeptao"),
        rounds=7,
        clients_per_round=3,
        peft=PeftConfig(method="ptuning_v2", tokens=3),
        task=TaskConfig(kind="classification", max_length=16),
        client=ClientConfig(steps=3, epochs=None, batch_size=4, lr=4e-2, schedule="constant", weight_decay=0.1),
        eval=EvalConfig(where="none", clients=-1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("personal", [True, False])
def test_one_command_runs_all_phases(config: Config, tmp_path: Path, personal: bool) -> None:
    SENT.clear()
    CAME.clear()
    strategy = RecordingFedPepTAO(warmup_rounds=2, score_rows=5, ratio=0.5, personal=personal)
    state, observer = federate(tmp_path / "r", config, strategy)
    space = workspace(json.dumps(to_dict(config)))
    prompts, heads = ["layers.0.prompt", "layers.1.prompt"], ["score.weight"]
    (local,) = strategy.local(state)
    (shared,) = (n for n in prompts if n != local)
    assert [r["dropped"] for r in observer.records[1:]] == [{}] * 7 and [r["counted"] for r in observer.records[1:]] == [3] * 7
    replies = [{(*prompts, *heads)}] * 2 + [{("layers",)}] + [{(shared, *heads)}] * 4
    assert [set(map(tuple, CAME[r].values())) for r in range(1, 8)] == replies
    assert ["train_loss" in r for r in observer.records[1:]] == [True] * 2 + [False] + [True] * 4
    assert observer.notes == [f"from now on 1 of 2 layers are exchanged: {prompts.index(shared)}"]
    met: set[str] = set()
    for round in range(4, 8):  # only a client's first partial turn gets all layers
        for client in CAME[round]:
            assert SENT[round][client] == ([shared, *heads] if client in met else [*prompts, *heads])
        met |= CAME[round].keys()
    before = RunDirectory(tmp_path / "r", config).newest()[0]
    assert before is not None and torch.equal(before.state.adapter[local], state.adapter[local])
    store = Storage.in_folder(tmp_path / "r" / "clients", config).store
    own = [s[local] for c in sorted(met) if (s := store.read(c, 8)) is not None]
    assert len(own) == len(met) == 4
    # the clients' own layers continued from the warm-up's result, or kept it
    assert all(torch.equal(t, state.adapter[local]) is not personal for t in own)
    assert all(float((t - state.adapter[local]).abs().max()) < 1.0 for t in own)
    assert not torch.equal(state.adapter[local], space.initial[local])


@pytest.mark.slow
def test_a_resumed_run_ends_like_an_uninterrupted_one(config: Config, tmp_path: Path) -> None:
    strategy = FedPepTAO(warmup_rounds=1, score_rows=5)
    whole, observer = federate(tmp_path / "whole", config, strategy)
    assert "estimated share" in observer.notes[0] and strategy.phase(whole) == "partial"
    for rounds in (5, 7):
        part, _ = federate(tmp_path / "part", dataclasses.replace(config, rounds=rounds), strategy)
    assert same(part, whole)

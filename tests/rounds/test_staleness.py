"""Late updates: their contribution, the version they apply to, that each counts once, and that late=drop ignores them."""

import dataclasses
import importlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import Config, DeviceClass, DevicesConfig
from fedtune.config.compose import choices, compose
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import LateUpdate, Update
from fedtune.contracts.strategy import Strategy
from fedtune.errors import ConfigError
from fedtune.rounds.find_strategy import make_strategy
from fedtune.rounds.staleness import apply_staleness, difference
from fedtune.simulations.engines.grid import InProcessGrid
from fedtune.strategies.fedavg import FedAvg
from tests.fakes import fake_bridge, fake_client_app, lora_state

ROOT = Path(__file__).parents[2]
CLIENTS = {"a": 1, "b": 3}  # client c adds n_c to every tensor
# by hand: round 1 counts a alone: 0 + 1. In round 2 a adds 1 to that, and b its round-1 difference of 3, scaled: 3 / √2:
# 1 + (1·1 + 3·3/√2) / 4
TWO_ROUNDS = 1 + (1 + 9 / math.sqrt(2)) / 4
DEVICES = DevicesConfig(classes={"phone": DeviceClass()}, deadline_s=30.0)


def config(**changes: Any) -> Config:
    return Config(**{"rounds": 2, "clients_per_round": 10, "late": "use", "round_timeout_s": 0.1, **changes})


def slow(rounds: Iterable[int], seconds: float = 31.0) -> Any:
    """A device that takes `seconds` virtual seconds in these rounds."""

    def act(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
        fields = json.loads(text)
        fields["measurements"]["virtual_s"] = seconds if round in rounds else 1.0
        return arrays, json.dumps(fields)

    return act


class SlowNode(InProcessGrid):
    """Node 2's reply to the train message of round 1 is available from round `available` on, again with each pull."""

    available, newest, pulls = 2, 0, 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.newest = max([self.newest, *(int(m.metadata.group_id) for m in messages if m.metadata.message_type == "train")])
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        out = []
        for i in message_ids:
            about = self._waiting[i].metadata if i in self._waiting else None
            ours = about is not None and about.message_type == "train" and about.dst_node_id == 2 and about.group_id == "1"
            if not ours:
                out += super().pull_messages([i])
            elif self.newest >= self.available:
                self.pulls += 1
                out += super().pull_messages([i])
        return out


def on_slow_node(path: Path, available: int = 2, faults: Any = None, **changes: Any) -> Any:
    app = fake_client_app(CLIENTS, faults)
    bridge, observer = fake_bridge(path, app, 2, config(**changes))
    grid = SlowNode(app, 2)
    grid.available = available
    return dataclasses.replace(bridge, grid=grid), observer


def value(state: Any) -> float:
    (only,) = {float(x) for t in state.adapter.tensors.values() for x in t.flatten()}
    return only


def test_an_update_one_round_late_counts_by_its_difference_over_root_two(tmp_path: Path) -> None:
    bridge, observer = on_slow_node(tmp_path / "r")
    assert value(bridge.loop()) == pytest.approx(TWO_ROUNDS)
    rows = {(r["round"], r["client"]): r for r in observer.clients}
    assert rows[1, "b"]["dropped"] == "late: no reply within 0.1 s" and "staleness" not in rows[1, "b"]
    assert rows[2, "b"]["staleness"] == 1 and rows[2, "b"]["bytes_up"] > 0 and "dropped" not in rows[2, "b"]
    assert (observer.records[1]["late_used"], observer.records[2]["late_used"], observer.records[2]["staleness"]) == (0, 1, 1.0)
    assert (observer.records[2]["cohort"], observer.records[2]["counted"]) == (1, 1)  # b got no new assignment
    kept = bridge.run.newest()[0].clients["b"]
    assert (kept["counted"], kept["dropped"], kept["last"]) == (1, 1, "counted in round 2, 1 late")


def test_a_simulated_device_is_late_by_the_virtual_clock(tmp_path: Path) -> None:
    bridge, observer = fake_bridge(tmp_path / "r", fake_client_app(CLIENTS, {"b": slow([1])}), 2, config(devices=DEVICES))
    assert value(bridge.loop()) == pytest.approx(TWO_ROUNDS)
    assert observer.records[1]["dropped"] == {"late": 1} and observer.records[2]["late_used"] == 1


@pytest.mark.parametrize(("seconds", "rounds"), [(31.0, 1), (60.0, 1), (60.1, 2), (120.0, 3)])
def test_a_simulated_late_update_counts_in_the_round_of_its_arrival(tmp_path: Path, seconds: float, rounds: int) -> None:
    bridge, observer = fake_bridge(
        tmp_path / "r", fake_client_app(CLIENTS, {"b": slow([1], seconds)}), 2, config(devices=DEVICES, rounds=5)
    )
    bridge.loop()
    (used,) = [r for r in observer.clients if "staleness" in r]
    assert (used["round"], used["staleness"]) == (1 + rounds, rounds)
    cohorts = [r["cohort"] for r in observer.records[1:]]
    assert cohorts == [2, *[1] * rounds, *[2] * (4 - rounds)]  # b gets no assignment until then


def test_updates_older_than_max_staleness_never_count(tmp_path: Path) -> None:
    alone = [1.0]  # only a: 1 after round 1; then both, which add 1 and 3: (1 + 9) / 4
    for _ in range(3):
        alone.append(alone[-1] + 2.5)
    bridge, observer = fake_bridge(
        tmp_path / "v", fake_client_app(CLIENTS, {"b": slow([1], 90.1)}), 2, config(devices=DEVICES, rounds=4, max_staleness=2)
    )
    assert value(bridge.loop()) == pytest.approx(alone[3]) and [r["cohort"] for r in observer.records[1:]] == [2, 2, 2, 2]
    bridge, observer = on_slow_node(tmp_path / "n", available=99, rounds=4, max_staleness=2)
    # b's reply is dropped after round 3, and b is paused, because it still does not answer
    assert value(bridge.loop()) == pytest.approx(1 + 1 + 1 + 1)
    assert [r["cohort"] for r in observer.records[1:]] == [2, 1, 1, 1] and not any("staleness" in r for r in observer.clients)


def test_late_drop_neither_waits_nor_uses(tmp_path: Path) -> None:
    bridge, observer = on_slow_node(tmp_path / "r", late="drop", rounds=3)
    assert (
        value(bridge.loop()) == pytest.approx(1 + 1 + 2.5) and bridge.grid.pulls == 1
    )  # b is paused in round 2: it did not answer in round 1
    assert [r["cohort"] for r in observer.records[1:]] == [2, 1, 2]
    assert not any("late_used" in r or "staleness" in r for r in [*observer.records, *observer.clients])


def test_an_older_update_beside_a_newer_one_is_unused(tmp_path: Path) -> None:
    bridge, observer = on_slow_node(tmp_path / "r", min_clients=2)  # both are needed, so b is asked again
    assert value(bridge.loop()) == pytest.approx(2.5)  # round 1 had too few updates
    assert observer.notes[-1] == "client b: its reply to round 1 is unused: a newer update of this client counts"
    assert next(r for r in observer.clients if (r["round"], r["client"]) == (2, "b"))["late"].startswith("its reply to round 1 is unused")
    assert observer.records[2]["late_used"] == 0


def test_late_updates_count_towards_min_clients(tmp_path: Path) -> None:
    """By hand: round 1 does not count with min_clients=2; b fails in round 2, where its late update is the second one."""

    def lose_update(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
        if round == 2:
            raise ValueError("broken")
        return arrays, text

    bridge, observer = on_slow_node(tmp_path / "r", faults={"b": lose_update}, min_clients=2)
    assert value(bridge.loop()) == pytest.approx((1 + 9 / math.sqrt(2)) / 4)
    row = next(r for r in observer.clients if (r["round"], r["client"]) == (2, "b"))
    assert row["dropped"].startswith("failed") and row["staleness"] == 1


def test_a_reply_pulled_twice_counts_once(tmp_path: Path) -> None:
    bridge, _ = on_slow_node(tmp_path / "r", rounds=4)
    # by hand: as above, then twice a and b in time
    assert value(bridge.loop()) == pytest.approx(TWO_ROUNDS + 2 * 2.5)
    assert bridge.grid.pulls == 1


def put_nan(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
    return ArrayRecord({**arrays, "head.weight": Array(torch.full((4, 7), math.nan))}), text


def reshape(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
    return ArrayRecord({**arrays, "q.lora_A": Array(torch.zeros(5, 2))}), text


def move_far(round: int, arrays: ArrayRecord, text: str) -> tuple[ArrayRecord, str]:
    return ArrayRecord({**arrays, "head.weight": Array(torch.full((4, 7), 1e6))}), text


def misreport(**changes: Any) -> Any:
    return lambda round, arrays, text: (arrays, json.dumps({**json.loads(text), **changes}))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (put_nan, "not finite"),
        (reshape, "is float32 (5, 2), wanted float32 (2, 5)"),
        (move_far, "it was not trained with this plan"),
        (misreport(base_version=1), "the update is for base_version 1, wanted 0"),
        (misreport(round=2), "the update is for round 2, wanted 1"),
        (misreport(client="a"), "the update is for client a, wanted b"),
        (misreport(examples=1000), "the client's hello reported 3"),
    ],
    ids=["nan", "shape", "reach", "version", "round", "client", "weight"],
)
def test_a_late_reply_is_checked_against_its_assignment(tmp_path: Path, fault: Any, sentence: str) -> None:
    bridge, observer = on_slow_node(tmp_path / "r", faults={"b": fault})
    assert value(bridge.loop()) == pytest.approx(2.0)  # only a, twice
    assert "client b: its reply to round 1 is refused: " in observer.notes[-1] and sentence in observer.notes[-1]
    assert observer.records[2]["late_used"] == 0


@pytest.mark.slow
def test_a_resumed_run_keeps_late_updates(tmp_path: Path) -> None:
    app = fake_client_app({"a": 1, "b": 3, "c": 5}, {"b": slow([1, 4], 70.0), "c": slow([2, 5], 31.0)})
    whole, heard = fake_bridge(tmp_path / "whole", app, 3, config(devices=DEVICES, rounds=7))
    expected = whole.loop()
    assert sum("staleness" in r for r in heard.clients) == 4
    for stop in (1, 2, 4, 5):  # a late update is kept after each of these rounds
        path = tmp_path / f"part{stop}"
        first, _ = fake_bridge(path, app, 3, config(devices=DEVICES, rounds=stop))
        first.loop()
        first.run.close()
        second, observer = fake_bridge(path, app, 3, config(devices=DEVICES, rounds=7))
        actual = second.loop()
        assert all(torch.equal(expected.adapter[n], actual.adapter[n]) for n in expected.adapter.tensors), f"stopped after round {stop}"
        seen = [{k: v for k, v in r.items() if k != "seconds"} for r in (*heard.records, *observer.records) if r["round"] > stop]
        assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
        kept = [bridge.run.newest()[0] for bridge in (whole, second)]
        assert kept[0] is not None and kept[1] is not None and kept[0].clients == kept[1].clients
        second.run.close()


def test_a_checkpoint_without_late_updates_has_no_late_file(tmp_path: Path) -> None:
    bridge, _ = fake_bridge(tmp_path / "r", fake_client_app(CLIENTS, {"b": slow([1])}), 2, config(devices=DEVICES))
    bridge.loop()
    files = [{f.name for f in (tmp_path / "r" / "checkpoints" / f"round-000{i}").iterdir()} for i in (1, 2)]
    assert files[0] - files[1] == {"late.safetensors"} and len(files[1]) == 3
    assert "late" not in json.loads((tmp_path / "r/checkpoints/round-0002/checkpoint.json").read_text())


# -- the arithmetic -----------------------------------------------------------------------------------------------------------------------


def update(client: str, adapter: AdapterState, examples: int = 1) -> Update:
    return Update(client=client, round=1, base_version=0, adapter=adapter, examples=examples)


def test_the_scaled_difference_by_hand() -> None:
    start, now, sent = lora_state(fill=1.0), lora_state(fill=10.0, version=3), lora_state(fill=5.0)
    late = LateUpdate(update=difference(update("a", sent), start), due=4)
    out = apply_staleness(late, now, 3).adapter
    assert all(torch.equal(t, torch.full_like(t, 12.0)) for t in out.tensors.values())  # 10 + (5 − 1) / √(1 + 3)
    assert (out.spec, list(out.tensors)) == (now.spec, list(now.tensors)) and float(sent["head.weight"][0, 0]) == 5.0


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50))
def test_an_update_in_time_is_unchanged(a: int, b: int) -> None:
    start, sent = lora_state(seed=a), lora_state(seed=b)
    out = apply_staleness(LateUpdate(update=difference(update("a", sent), start), due=1), start, 0).adapter
    for name in sent.tensors:
        torch.testing.assert_close(out[name], sent[name])


def test_the_difference_of_half_precision_loses_nothing() -> None:
    start = lora_state(seed=1)
    start = start.replace({n: t.bfloat16() for n, t in start.tensors.items()})
    sent = start.replace({n: (t.float() * 1.01).bfloat16() for n, t in start.tensors.items()})
    out = apply_staleness(LateUpdate(update=difference(update("a", sent), start), due=1), start, 0).adapter
    assert all(torch.equal(out[n], sent[n]) and out[n].dtype == torch.bfloat16 for n in sent.tensors)


def as_configured(name: str) -> Strategy:
    args = yaml.safe_load((ROOT / "conf/strategy" / f"{name}.yaml").read_text(encoding="utf-8"))
    args.pop("defaults", None)
    module, _, kind = args.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), kind)(**args)


STRATEGIES = [(n, as_configured(n)) for n in choices("strategy")]
TAKES = {
    "apfl",
    "diloco",
    "ditto",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "feddat",
    "feddpa",
    "fedmezo",
    "fedprox",
    "fedrot",
    "fedyogi",
    "ffa",
    "fwdllm",
    "ravan",
}


def test_which_strategies_accept_late_updates() -> None:
    """Those that average the same tensors of one adapter in every round; the others depend on version, cohort or order."""
    assert {n for n, s in STRATEGIES if s.requirements.accepts_stale} == TAKES


@pytest.mark.parametrize(("name", "strategy"), [p for p in STRATEGIES if p[0] in TAKES], ids=sorted(TAKES))
def test_order_is_irrelevant_and_the_step_is_fedbuffs(name: str, strategy: Any) -> None:
    before = strategy.start(lora_state(seed=0))
    deltas, stale, weights = [0.5, -0.25, 1.0], [0, 1, 3], [1, 3, 2]
    updates = []
    for c, (d, s, n) in enumerate(zip(deltas, stale, weights, strict=True)):
        old = strategy.start(lora_state(seed=c + 5)).adapter
        sent = old.replace({k: t + d for k, t in old.tensors.items()})
        updates.append(apply_staleness(LateUpdate(update=difference(update(f"c{c}", sent, n), old), due=4), before.adapter, s))
    # by hand: Σ p_k Δ_k / √(1 + s_k) = (1·0.5/1 − 3·0.25/√2 + 2·1/2) / 6, as one client would send it
    move = (0.5 - 0.75 / math.sqrt(2) + 1.0) / 6
    one = update("one", before.adapter.replace({k: t + move for k, t in before.adapter.tensors.items()}))
    expected = strategy.aggregate(4, before, [one])
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        after = strategy.aggregate(4, before, [updates[i] for i in order])
        for k in expected.adapter.tensors:
            torch.testing.assert_close(after.adapter[k], expected.adapter[k], rtol=1e-5, atol=1e-5)


# -- refused settings ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(n for n, _ in STRATEGIES if n not in TAKES))
def test_other_strategies_refuse_late_updates_by_name(name: str) -> None:
    (job,) = compose([f"strategy={name}", "devices=none", "late=use", "round_timeout_s=60"])
    kind = str(job.config.strategy["_target_"]).rpartition(".")[2]
    with pytest.raises(ConfigError, match=f"^{kind} cannot use late updates: set late=drop"):
        make_strategy(job.config)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["late=use", "devices=none"], "late=use has no effect, because rounds wait for all clients"),
        (["late=use", "round_timeout_s=60", "privacy=user"], "late=use cannot be combined with privacy=user"),
        (["late=keep"], "late=keep is not known: choose one of drop, use"),
        (["late=use", "round_timeout_s=60", "max_staleness=0"], "max_staleness=0 is out of range"),
    ],
)
def test_invalid_settings_for_late_updates_give_a_one_sentence_error(given: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        compose(given)


def test_record_level_privacy_works_with_late_updates() -> None:
    """A client pays for its turn in its own ledger, whenever the reply counts: the guarantee does not depend on the round."""
    (job,) = compose(["late=use", "round_timeout_s=60", "privacy=record", "devices=none", "strategy=fedavg"])
    assert make_strategy(job.config) == FedAvg()

"""Complete runs with devices: the choice, out of memory, corrections between turns, and resumption."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.clients.devices import probe
from fedtune.clients.devices.choice import Correction
from fedtune.clients.devices.estimate import memory_bytes, shapes_of
from fedtune.clients.devices.fitting import _tokens, for_device
from fedtune.clients.host import ClientHost
from fedtune.clients.trainer import TrainingResult
from fedtune.config import ClientConfig, Config, DeviceClass, DevicesConfig, EngineConfig, EvalConfig, ModelConfig, TaskConfig
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import Plan
from fedtune.contracts.task import IGNORED
from fedtune.data import Example
from fedtune.errors import Decline
from fedtune.experiment import simulate
from fedtune.models import lean
from tests.tiny import tiny_config
from tests.working import host_for

PLAN = Plan(round=1, client="c0", base_version=0, steps=4, epochs=None, batch_size=4, lr=1e-2, lr_last=1e-3)


def config(path: Path, devices: Mapping[str, DeviceClass], deadline_s: float | None = None, **changes: Any) -> Config:
    given = tiny_config(path, devices=DevicesConfig(classes=dict(devices), deadline_s=deadline_s), **changes)
    given.client.lean = "none"  # so that the estimate for PEFT's modules applies
    return given


def host_in(path: Path, **profile: Any) -> ClientHost:
    """A host whose clients are all of one class; `deadline_s` is the run's."""
    deadline_s = profile.pop("deadline_s", None)
    return host_for(config(path, {"phone": DeviceClass(**profile)}, deadline_s))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> AdapterState:
    return AdapterState.load(run / "adapter" / "fedtune.safetensors")


def needs(host: ClientHost, precision: str, micro: int, plan: Plan = PLAN) -> float:
    """MB by the estimate, for the client's own rows."""
    rows = host.space.examples(plan.client, "train")
    width = max(len(e.input_ids) for e in rows)
    return sum(memory_bytes(host.devices.shapes, precision, host.devices.shapes.entries, micro, width, width - 1)) / 1e6


def test_a_turn_without_a_lean_step_is_estimated_as_such(tmp_path: Path) -> None:
    given = config(tmp_path, {"phone": DeviceClass()})
    given.client.lean = "auto"
    host = host_for(given)
    fits = host.devices.fit(PLAN, host.space.initial, 0)
    assert fits is not None and fits[2].shapes is host.devices.shapes and "fp32" in fits[2].shapes.lean
    lean.disable(host.space.own.live)  # as in a sparse turn, or after a shift of quantized weights
    fits = host.devices.fit(dataclasses.replace(PLAN, round=2), host.space.initial, 0)
    assert fits is not None and not fits[2].shapes.lean and fits[2].rest > 0


def test_without_devices_nothing_is_chosen(tmp_path: Path) -> None:
    host = host_for(tiny_config(tmp_path))
    assert host.devices.fixed_choice("c0").rank is None and host.loaded_model("c0") is host.space.own
    assert host.devices.fit(PLAN, host.space.initial, 0) is None


def test_all_precisions_share_one_fingerprint_and_load_one_model_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    host = host_for(tiny_config(tmp_path))
    models = [host.space.loaded_model(p) for p in ("fp32", "bf16")]
    assert models[0] is host.space.own and host.space.loaded_model("bf16") is models[1]
    assert models[0].backbone.fingerprint == models[1].backbone.fingerprint
    assert list(models[0].live.parameters) == list(models[1].live.parameters)
    assert models[1].weights_bytes < 0.6 * models[0].weights_bytes


def test_a_large_device_follows_the_plan(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    fits = host.devices.fit(PLAN, host.space.initial, 0)
    assert fits is not None
    plan, examples, fitted = fits
    assert plan == PLAN and examples is host.space.examples("c0", "train")
    assert (fitted.choice.precision, fitted.micro, fitted.choice.rank, fitted.out_of_memory) == ("fp32", 4, 2, 0)


def test_memory_time_and_rank_shape_the_turn(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    room = 1.02 * needs(host_in(tmp_path / "a"), "fp32", 2) / 0.9
    host = host_in(tmp_path / "a", memory_mb=room, precision="fp32", gflops_per_core=1e-3, deadline_s=5.0, rank=1)
    assert host.devices.fixed_choice("c0").rank == 1
    start = host.space.initial.replace({n: t[:1] if n.endswith("A") else t[:, :1] for n, t in host.space.initial.tensors.items()})
    fits = host.devices.fit(PLAN, start.replace(start.tensors, ranks=dict.fromkeys(start.spec.ranks, 1)), 0)
    assert fits is not None
    plan, _, fitted = fits
    assert (plan.batch_size, fitted.micro, fitted.choice.rank) == (4, 2, 1) and 1 <= (plan.steps or 0) < 4 and plan.epochs is None


def test_shorter_rows_are_encoded_again_and_keep_their_labels(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    short = host.space.examples("c0", "train", 4)
    assert max(len(e.input_ids) for e in short) == 4 < max(len(e.input_ids) for e in host.space.examples("c0", "train"))
    assert len(short) == len(host.space.examples("c0", "train")) and all(len(e.labels) == len(e.input_ids) for e in short)


def test_a_device_out_of_memory_halves_and_reports_it(tmp_path: Path) -> None:
    measured = host_in(tmp_path).devices
    fits = measured.fit(PLAN, host_in(tmp_path).space.initial, 0)
    assert fits is not None and fits[2].rest
    # memory for two rows by the estimate, but the stored correction says that a row needs hardly any
    host = host_in(tmp_path, memory_mb=1.1 * needs(host_in(tmp_path), "fp32", 2), precision="fp32")
    devices = host.devices
    plan = dataclasses.replace(PLAN, round=2)
    devices._write(dataclasses.replace(PLAN, round=1), fits[2], 1, None)
    fitted = devices.fit(plan, host.space.initial, 0)
    assert fitted is not None
    assert (fitted[2].choice.micro, fitted[2].micro, fitted[2].out_of_memory) == (4, 2, 1)
    assert fitted[2].weights + fitted[2].rest <= (host.config.devices.classes["phone"].memory_mb or 0) * 1e6
    report = devices.report(plan, fitted[1], fitted[2], TrainingResult(loss=1.0, steps=4, seconds=1.0, peak_mb=999.0), 0)
    assert report["out_of_memory"] == 1 and report["micro_batch"] == 2 and report["peak_mb"] < 10
    # and the next turn begins with two rows
    after = devices.fit(dataclasses.replace(PLAN, round=3), host.space.initial, 0)
    assert after is not None and (after[2].choice.micro, after[2].out_of_memory) == (2, 0)


def test_a_row_that_does_not_fit_declines_and_corrects_the_next_choice(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    fits = host.devices.fit(PLAN, host.space.initial, 0)
    assert fits is not None
    weights = host.space.own.weights_bytes
    small = host_in(tmp_path, memory_mb=(weights + 20_000) / 1e6 / 0.9, precision="fp32")
    small.devices._fixed["c0"] = host.devices.fixed_choice("c0")
    small.devices._write(PLAN, fits[2], 1, None)
    plan = dataclasses.replace(PLAN, round=2)
    with pytest.raises(Decline, match=r"^out of memory with a single row of \d+ tokens: 0\.\d MB of") as bad:
        small.devices.fit(plan, host.space.initial, 0)
    assert bad.value.kind == "memory" and small.devices._read("c0", 3).memory > 0.3 > small.devices._read("c0", 2).memory


def test_a_turn_corrects_the_next_one(tmp_path: Path) -> None:
    # by the longest row fewer steps fit; the measured time, with the batches' real padding, shows that more do
    host = host_in(tmp_path, gflops_per_core=1e-3, deadline_s=60.0)
    fits = host.devices.fit(dataclasses.replace(PLAN, steps=50), host.space.initial, 0)
    assert fits is not None
    plan, examples, fitted = fits
    report = host.devices.report(plan, examples, fitted, TrainingResult(loss=1.0, steps=plan.steps or 0, seconds=9.0, peak_mb=0.0), 0)
    assert report["virtual_s"] < report["estimated_s"]
    kept = host.devices._read("c0", 2)
    assert kept.time == pytest.approx(
        (report["virtual_s"] / report["estimated_s"]) ** 0.5
    )  # the geometric mean of 1 and the observed ratio
    after = host.devices.fit(dataclasses.replace(PLAN, round=2, steps=50), host.space.initial, 0)
    assert after is not None and after[2].used == kept and (after[0].steps or 0) > (plan.steps or 0)
    assert host.devices._read("c0", 1) == Correction()  # as of that round


def test_tokens_of_a_turn_by_hand() -> None:
    rows = [Example(np.zeros(n, np.int32), np.zeros(n, np.int32)) for n in (2, 3, 5, 7)]
    plan = dataclasses.replace(PLAN, batch_size=4, accumulate=3)
    assert _tokens(plan, rows, 2, 16) == 2 * 3 * 4 * 7  # six batches of all four rows, each padded to the longest
    assert _tokens(dataclasses.replace(plan, privacy="record"), rows, 2, 16) == 2 * 3 * 4 * 16


def test_a_real_device_is_measured_by_its_own_memory_and_clock(tmp_path: Path) -> None:
    host = host_for(tiny_config(tmp_path), DeviceClass(memory_mb=1000.0, gflops_per_core=1.0, offline=1.0))
    assert not host.devices.is_offline("c0", 1)  # only simulated devices are offline at random
    fits = host.devices.fit(dataclasses.replace(PLAN, accumulate=2), host.space.initial, 0)
    assert fits is not None and not fits[2].simulated and fits[2].micro == 4
    plan, examples, fitted = fits
    turned = TrainingResult(loss=1.0, steps=4, seconds=2.5, peak_mb=150.0, began_mb=140.0, micro=2, out_of_memory=1)
    report = host.devices.report(plan, examples, fitted, turned, 0)
    assert (report["micro_batch"], report["out_of_memory"]) == (2, 1) and "peak_mb" not in report and "virtual_s" not in report
    width = max(len(e.input_ids) for e in examples)
    expected = memory_bytes(host.devices.shapes, "fp32", fitted.work.entries, 2, width, width - 1)[1]
    assert host.devices._read("c0", 2).memory == pytest.approx(10e6 / expected)
    host.devices.report(plan, examples, fitted, dataclasses.replace(turned, seconds=0.25), 0)  # a short turn gives a correction too
    assert host.devices._read("c0", 2).time == pytest.approx((0.25 / report["estimated_s"]) ** 0.5)


def test_a_real_device_never_loads_a_precision_that_exceeds_its_memory(tmp_path: Path) -> None:
    given = tiny_config(tmp_path)
    assert for_device(given, DeviceClass()).model.precision == "fp32"
    weights, rest = memory_bytes(shapes_of(given), "bf16", shapes_of(given).entries, 1, 16, 15)
    assert for_device(given, DeviceClass(memory_mb=1.01 * (weights + rest) / 0.9e6)).model.precision == "bf16"
    with pytest.raises(Decline, match="it needs more memory"):
        for_device(given, DeviceClass(memory_mb=0.01))


def mixed_config(path: Path, **changes: Any) -> Config:
    """Three device classes: one is slow, one runs in bf16, and each is sometimes late or offline."""
    classes = {
        "phone": DeviceClass(precision="bf16", gflops_per_core=1e-3, jitter=0.4, offline=0.1),
        "board": DeviceClass(gflops_per_core=2e-3, jitter=0.2),
        "laptop": DeviceClass(),
    }
    return config(path, classes, 5.0, **changes)


def test_the_choice_is_in_the_metrics_and_the_cohort_is_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = simulate(mixed_config(tmp_path))
    turns = [x for x in lines(run) if x.get("precision")]
    assert {x["precision"] for x in turns} == {"fp32", "bf16"} and {x["device_class"] for x in turns} == {"phone", "board", "laptop"}
    numbers = ("rank", "batch", "micro_batch", "length", "steps", "out_of_memory", "estimated_mb", "estimated_s", "peak_mb", "virtual_s")
    assert all(isinstance(x[k], float | int) for x in turns for k in numbers)
    assert all(0 < x["peak_mb"] < 10 for x in turns)  # the simulated device's memory, not this process's
    assert "Devices' choices per turn" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = simulate(mixed_config(tmp_path, rounds=4))
    half = shutil.copytree(whole, tmp_path / "half")
    for round in (3, 4):
        shutil.rmtree(half / "checkpoints" / f"round-{round:04d}")
    shutil.rmtree(half / "adapter")
    run_config = dataclasses.replace(mixed_config(tmp_path, rounds=4), resume=str(half))
    again = simulate(run_config)
    first, second = adapter(whole), adapter(again)
    assert all(torch.equal(first[n], second[n]) for n in first.tensors)
    drop = ("seconds", "bytes_up")  # the wall clock, and its digits in the reply
    assert [{k: v for k, v in x.items() if k not in drop} for x in lines(whole)] == [
        {k: v for k, v in x.items() if k not in drop} for x in lines(again)
    ]


def test_a_device_without_any_fitting_model_is_excluded_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classes = {"watch": DeviceClass(memory_mb=0.01, precision="fp32"), "laptop": DeviceClass()}
    with caplog.at_level("INFO", "fedtune"):
        simulate(config(tmp_path, classes))
    assert "rejected: client" in caplog.text and "it needs more memory, a smaller backbone or a smaller adapter" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("batched", ["4", "auto"])
def test_four_precisions_train_in_one_cohort_batched_or_sequentially(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], batched: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    classes = {p: DeviceClass(precision=p) for p in ("fp32", "bf16", "int8", "nf4")}
    nano = ModelConfig(source="nano")
    given = config(tmp_path, classes, rounds=1, model=nano, client=ClientConfig(steps=2, epochs=None, batch_size=4))
    given = dataclasses.replace(given, eval=EvalConfig(where="none", clients=0), clients_per_round=8)
    results = {}
    for mode in ("none", batched):
        run = simulate(dataclasses.replace(given, engine=EngineConfig(threads=1, batched=mode)))
        results[mode] = {x["client"]: x for x in lines(run) if x.get("precision")}
        assert {x["precision"] for x in results[mode].values()} == set(classes)
    for client, alone in results["none"].items():
        within = 1e-4 if alone["precision"] == "fp32" else 0.05
        assert results[batched][client]["train_loss"] == pytest.approx(alone["train_loss"], rel=within)
        assert results[batched][client]["peak_mb"] == alone["peak_mb"]


def test_transfer_counts_received_and_sent_bytes(tmp_path: Path) -> None:
    run = simulate(config(tmp_path, dict.fromkeys(("phone", "board", "laptop"), DeviceClass(mbit_per_second=0.5))))
    turns = [x for x in lines(run) if x.get("precision")]
    one_way = sum(t.nbytes for t in adapter(run).tensors.values())
    # computing takes no time, and the network as long before the turn as after it: 2 · 8 bits a byte, 0.5 Mbit a second
    assert turns and all(x["estimated_s"] == x["virtual_s"] == pytest.approx(2 * 8 * one_way / 0.5e6) for x in turns)


def test_the_probe_measures_the_turn_s_own_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TaskConfig(kind="instruction", max_length=16, max_new_tokens=1, stride_texts=False)
    given = config(tmp_path, {"phone": DeviceClass(), "board": DeviceClass(), "laptop": DeviceClass()}, task=task)
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, prompt="{question}", answer=" {reply}"))
    host = host_for(given)
    shapes = list[tuple[int, int, int]]()
    monkeypatch.setattr(probe, "kept_bytes", lambda slot, task, names, *size: shapes.append(size) or 1)
    rows = [Example(np.zeros(5, np.int32), np.array([IGNORED] * 4 + [3], np.int32))] * 8  # one token of five has a loss
    monkeypatch.setattr(host.space, "examples", lambda *_: rows)
    assert host.devices.fit(PLAN, host.space.initial, 0) is not None and shapes == [(4, 5, 1)]


def test_the_rank_of_a_turn_is_the_largest_of_its_layers(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    ranks = dict(host.space.initial.spec.ranks)
    first = next(iter(ranks))
    tensors = {
        n: (t[:1] if n.endswith("A") else t[:, :1]) if n.startswith(f"{first}.") else t for n, t in host.space.initial.tensors.items()
    }
    fits = host.devices.fit(PLAN, host.space.initial.replace(tensors, ranks={**ranks, first: 1}), 0)
    assert fits is not None and fits[2].choice.rank == 2

"""The choices and reports of a private turn do not depend on any row: neighboring data sets give the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.clients.devices.choice import describe
from fedtune.clients.trainer import TrainingResult
from fedtune.clients.workspace import Workspace
from fedtune.config import ClientConfig, Config, DeviceClass, DevicesConfig, PrivacyConfig, TaskConfig, check
from fedtune.experiment import simulate
from fedtune.privacy.turn import turn_privacy
from fedtune.rounds.planning import base_plan
from fedtune.runs.report import read_metrics
from tests.quick import quick
from tests.tiny import texts, tiny_config
from tests.working import host_for

PRIVATE = {
    "record": PrivacyConfig(kind="record", epsilon=8.0, clip=0.5, accountant="rdp"),
    "user": PrivacyConfig(kind="user", where="client", epsilon=8.0, clip=0.5, accountant="rdp"),
}
TASKS = {
    "causal_lm": TaskConfig(kind="causal_lm", max_length=16, stride_texts=False),
    "instruction": TaskConfig(kind="instruction", max_length=16, max_new_tokens=4),
    "classification": TaskConfig(kind="classification", max_length=16),
}
TRAINED = 0  # index of the row in the file
SLOW = DeviceClass(gflops_per_core=1e-3, memory_mb=0.9, mbit_per_second=10.0, jitter=0.1)


def neighbors(folder: Path, kind: str, short: str = "cat door", **changes: Any) -> tuple[Config, Config]:
    """Two experiments that differ in one row of client c0: in one it is as long as a row can be, in the other it is `short`."""
    out = []
    for name, text in (("long", "lamp kettle door window " * 20), ("short", short)):
        rows = [{**row, "text": "cat door", "question": "cat", "reply": "door"} for row in texts(40)]
        rows[TRAINED] |= {"text": text, "question": text, "reply": text[:8]}
        (folder / name).mkdir()
        client = ClientConfig(steps=6, epochs=None, batch_size=4, lr=1e-2, schedule="constant")
        config = tiny_config(folder / name, rows, privacy=PRIVATE.get(kind, PrivacyConfig()), **{"client": client, **changes})
        if config.task.kind == "instruction":
            config.data.prompt, config.data.answer = "{question}", " {reply}"
        out.append(check(config))
    assert widths(out[0])[-1] > widths(out[1])[-1]  # the row that differs is a training row
    return out[0], out[1]


def widths(config: Config) -> list[int]:
    return sorted(len(e.input_ids) for e in Workspace(config).examples("c0", "train"))


def turn(config: Config, own: DeviceClass | None, spent: float) -> dict[str, Any]:
    """The device's reports about itself and three turns. A turn takes `spent` seconds and spent / 10 MB, with `spent` rows at a time."""
    host = host_for(config, own)
    profile = host.devices.of("c0")
    assert profile is not None
    out: dict[str, Any] = {"hello": describe(profile, host.devices.first_choice("c0"))}
    for round in (1, 2, 3):
        fits = host.devices.fit(base_plan(config, round, "c0", 0), host.space.initial, 1000)
        assert fits is not None
        plan, examples, fitted = fits
        private = turn_privacy(plan, len(examples), plan.steps or 0)
        did = TrainingResult(
            loss=None, steps=plan.steps or 0, seconds=spent, peak_mb=spent / 10, began_mb=0.1, micro=int(spent), out_of_memory=1
        )
        out[f"turn {round}"] = plan, fitted.choice, private, host.devices.report(plan, examples, fitted, did, 1000)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task"), [*(("record", task) for task in TASKS), ("user", "causal_lm")])
@pytest.mark.parametrize("real", quick([False, True], True), ids=["simulated", "real"])
def test_a_device_chooses_and_reports_the_same_for_neighbors(tmp_path: Path, kind: str, task: str, real: bool) -> None:
    devices = DevicesConfig(classes={"phone": SLOW}, deadline_s=20.0)
    a, b = neighbors(tmp_path, kind, task=TASKS[task], devices=devices, round_timeout_s=20.0)
    own = SLOW if real else None
    assert turn(a, own, 4.0) == turn(b, own, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True], ids=["simulated", "real"])
def test_without_privacy_a_device_depends_on_its_rows(tmp_path: Path, real: bool) -> None:
    devices = DevicesConfig(classes={"phone": SLOW}, deadline_s=20.0)
    a, b = neighbors(tmp_path, "none", devices=devices, round_timeout_s=20.0)
    own = SLOW if real else None
    one, two = turn(a, own, 4.0), turn(b, own, 2.0)
    assert all(one[name] != two[name] for name in one)  # the profile makes the choice depend on the rows


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), quick([("record", False), ("record", True), ("user", True)], ("record", True)))
def test_a_run_reports_the_same_numbers_for_neighbors(tmp_path: Path, kind: str, devices: bool) -> None:
    device_config = DevicesConfig(classes={"phone": SLOW}, deadline_s=20.0) if devices else DevicesConfig()
    one, two = (server_metrics(config) for config in neighbors(tmp_path, kind, devices=device_config))
    assert len(one) == 8 and one == two
    assert all({"epsilon", "dp_noise", "steps", "lr_sum"} <= r.keys() and not {"seconds", "train_loss"} & r.keys() for r in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", quick(["record", "user", "none"], "user", "none"))
def test_a_private_turn_counts_a_row_that_is_too_short_to_learn_from(tmp_path: Path, kind: str) -> None:
    epochs = ClientConfig(steps=None, epochs=3.0, batch_size=2, lr=1e-2, schedule="constant")
    pair = neighbors(tmp_path, kind, short="a", client=epochs, rounds=1)
    for config in pair:  # without an end token, "a" is a single token
        settings = Path(config.model.name) / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    long, short = (len(Workspace(config).examples("c0", "train")) for config in pair)
    assert (long, short) == ((8, 7) if kind == "none" else (8, 8))
    if kind == "record":
        one, two = map(server_metrics, pair)
        assert len(one) == 4 and one == two  # steps and ε follow from the count


def server_metrics(config: Config) -> list[dict[str, Any]]:
    """The server's metrics of each turn of a run without dropped turns."""
    records = [r for r in read_metrics(simulate(config)) if r["client"] is not None and r["round"] > 0]
    assert not any("dropped" in r for r in records)
    # the bytes of noised tensors differ in ids and digits; nothing else may differ
    return [{n: v for n, v in r.items() if n != "bytes_up"} for r in records]

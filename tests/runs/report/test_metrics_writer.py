"""metrics.jsonl survives kills, and its TensorBoard mirror agrees with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import CheckpointError
from fedtune.runs.report import MetricsWriter, read_metrics


def fill(run: Path, rounds: int) -> None:
    writer = MetricsWriter(run, None)
    for r in range(rounds):
        writer.write({"round": r, "client": "a", "device_class": "phone", "exact_match": 0.1 * r})
        writer.write({"round": r, "client": "b", "device_class": "phone", "exact_match": 0.3 * r})
        writer.write({"round": r, "client": None, "exact_match": 0.2 * r, "dropped": {"late": r}})
    writer.close()


def scalars(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run)).Reload()
    return {tag: {e.step: round(e.value, 6) for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    writer.write({"round": 0, "client": None, "loss": 1.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 0, "client": null, "loss": 1.5}\n'
    writer.close()


def test_nan_becomes_null_and_numpy_numbers_become_plain(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    nested = {"x": float("-inf"), "y": [float("nan"), 1]}
    writer.write({"round": 0, "client": None, "loss": float("nan"), "perplexity": np.float64("inf"), "n": np.int64(3), "more": nested})
    writer.close()
    assert read_metrics(tmp_path) == [
        {"round": 0, "client": None, "loss": None, "perplexity": None, "n": 3, "more": {"x": None, "y": [None, 1]}}
    ]
    assert set(scalars(tmp_path)) == {"global/n"}


@pytest.mark.parametrize("torn", ['{"round": 3, "cli', '{"round": 3, "client": "\xff'.encode("latin-1"), '{"round": 3'])
def test_an_incomplete_last_line_is_skipped(tmp_path: Path, torn: Any) -> None:
    fill(tmp_path, 3)
    before = read_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(torn if isinstance(torn, bytes) else torn.encode())
    assert read_metrics(tmp_path) == before
    assert len(before) == 9


@pytest.mark.parametrize("damage", ['{"round": 0, "cli', "[1]", '{"client": "a"}', "", "null"])
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, 1)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, lines[2]]) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2 is damaged"):
        read_metrics(tmp_path)


def test_missing_metrics_give_a_one_sentence_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is .* a run directory"):
        read_metrics(tmp_path)


def test_a_new_run_does_not_write_into_an_old_one(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with pytest.raises(CheckpointError, match="already exists"):
        MetricsWriter(tmp_path, None)


def test_resuming_drops_later_rounds_and_the_incomplete_line(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"round": 4, "cl')
    writer = MetricsWriter(tmp_path, resume_round=1)
    assert [r["round"] for r in read_metrics(tmp_path)] == [0, 0, 0, 1, 1, 1]
    writer.write({"round": 2, "client": None, "exact_match": 0.9})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["round"] for line in text.splitlines()] == [0, 0, 0, 1, 1, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_resuming_before_the_first_line_starts_the_file(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_round=0)
    writer.write({"round": 1, "client": None})
    writer.close()
    assert [r["round"] for r in read_metrics(tmp_path)] == [1]


def test_tensorboard_shows_rounds_and_device_classes(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    assert scalars(tmp_path) == {
        "global/exact_match": {0: 0.0, 1: 0.2},
        "global/dropped/late": {0: 0.0, 1: 1.0},
        "clients/phone/exact_match/mean": {0: 0.0, 1: 0.2},  # (0.1 + 0.3) / 2
        "clients/phone/exact_match/worst": {0: 0.0, 1: 0.1},
    }


def test_tensorboard_of_a_resumed_run_matches_its_lines(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    writer = MetricsWriter(tmp_path, resume_round=1)
    writer.write({"round": 2, "client": None, "exact_match": 0.9})
    writer.close()
    events = scalars(tmp_path)
    assert events["global/exact_match"] == {0: 0.0, 1: 0.2, 2: 0.9}
    assert events["clients/phone/exact_match/mean"] == {0: 0.0, 1: 0.2}


def test_the_worst_perplexity_is_the_highest(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, None)
    for client, perplexity in (("a", 10.0), ("b", 30.0)):
        writer.write({"round": 0, "client": client, "device_class": "hub", "perplexity": perplexity})
    writer.close()
    events = scalars(tmp_path)
    assert events == {"clients/hub/perplexity/mean": {0: 20.0}, "clients/hub/perplexity/worst": {0: 30.0}}

"""The benchmark of batched clients at toy size: the content of its table, not speed."""

import re
from typing import Any

import pytest

from fedtune.simulations.benchmarks import batched as bench_batched
from fedtune.simulations.benchmarks.ray_baseline import Cost

TINY = ["--models", "nano", "--shapes", "2x8", "--precisions", "fp32", "--stacks", "1", "2", "--steps", "1", "--repeats", "1"]
RATIO = r"\d+\.\d\d"


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients instead of 32 for a faster decision."""
    monkeypatch.setattr(bench_batched, "WIDEST", 2)
    monkeypatch.setattr(bench_batched, "allowed", lambda live, turn_inputs, task: 2)


def table(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict[str, str], str]:
    """The only row as column → cell, and the complete output."""
    bench_batched.main([*TINY, *more])
    stdout = capsys.readouterr().out
    head, rule, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in stdout.splitlines() if line.startswith("|"))
    assert len(head) == len(rule) == len(row)
    return dict(zip(head, row, strict=True)), stdout


def test_the_table_has_every_way_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    row, output = table(capsys, "--spread")
    sides = ["one by one", "C=1", "C=2"]
    expected = ["model", "precision", "batch", "bare loop, turns/s", *(f"{s}, ×" for s in [*sides, "auto"])]
    assert list(row) == [*expected, *(f"MB {s}" for s in ["bare", *sides])]
    assert all(re.fullmatch(rf"{RATIO} \({RATIO}–{RATIO}\)", row[f"{s}, ×"]) for s in sides)
    best = "one by one" if "one by one" in row["auto, ×"] else "C=2"
    assert row["auto, ×"] == f"{row[f'{best}, ×']} ({best})"
    assert output.count("load average") == 2 and "auto decided in" in output


def test_a_cell_that_takes_too_long_is_a_dash_with_a_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_batched, "pays", lambda *args, **more: False)
    real, turns = bench_batched.seconds, [1.0, 1.0]  # seconds of the bare loop's first turns
    monkeypatch.setattr(bench_batched, "seconds", lambda run: turns.pop() if turns else real(run))
    # of 15 s: the bare loop's 7 turns × 2 rounds, auto's 4 × (2 + 2), C=2's 6 × 2, C=8's 8 × 2
    row, output = table(capsys, "--stacks", "2", "8", "--max-seconds-a-cell", "15")
    assert row["auto, ×"] == row["C=8, ×"] == row["MB C=8"] == "–" and row["C=2, ×"] != "–"
    assert "– nano fp32 2x8, auto's decision: would take about 16 s" in output
    assert "– nano fp32 2x8, C=8: would take about 16 s" in output


def test_the_table_includes_ray(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def baseline(recipe: Any, rounds: Any, workers: int) -> list[Cost]:
        assert [len(r.examples) for r in rounds] == [3] and rounds[0].batch == 2 and recipe.steps == 1
        return [Cost(seconds=6.0, mb=512.0)]

    monkeypatch.setattr(bench_batched, "baseline", baseline)
    monkeypatch.setattr(bench_batched, "pays", lambda *args, **more: False)
    row, _ = table(capsys, "--ray", "3")
    assert row["Ray, s a client"] == "2.00" and row["MB Ray"] == "512" and row["auto, ×"] == f"{row['one by one, ×']} (one by one)"
    # Ray runs half a turn a second: its ratio to the bare loop, and fedtune's ratio to it, from the table's rounded figures
    bare = float(row["bare loop, turns/s"])
    assert float(row["Ray, ×"]) == pytest.approx(0.5 / bare, abs=0.006)
    assert float(row["auto over Ray"]) == pytest.approx(2 * bare * float(row["one by one, ×"]), rel=0.02)

"""The benchmark of precisions: tables and curves from artificial figures, and one measured toy cell."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.simulations.benchmarks import precision as bench_precision

STEP = {"tiny": {"fp32": 600.0, "nf4": 650.0}, "0.4b": {"fp32": 3000.0, "nf4": 1250.0}}


def cells(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    stdout = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in stdout]
    assert len({len(r) for r in rows}) == 1
    return [rows[0], *rows[2:]]


def test_the_table_has_the_ratio_with_and_without_the_runtime(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(args: argparse.Namespace, size: str, precision: str, folder: str, part: str) -> dict[str, float]:
        loaded = {"libraries MB": 500.0, "weights MB": 9.0, "activations MB": 8.0, "load MB": 550.0, "load s": 1.0}
        return {} if part == "make" else loaded | ({"step MB": STEP[size][precision], "step s": 2.0} if part == "step" else {})

    monkeypatch.setattr(bench_precision, "in_process", measure)
    monkeypatch.setattr(sys, "argv", ["bench_precision", "--sizes", "tiny", "0.4b", "--precisions", "fp32", "nf4"])
    bench_precision.main()
    head, *rows = cells(capsys)
    assert head[2:-2] == list(bench_precision.COLUMNS)
    # by hand: 650 / 600 = 1.08; 1250 / 3000 = 0.42; (1250 - 650) / (3000 - 600) = 0.25
    assert [(r[0], r[1], *r[-2:]) for r in rows] == [
        ("tiny", "fp32", "1.00", "–"),
        ("tiny", "nf4", "1.08", "–"),
        ("0.4b", "fp32", "1.00", "1.00"),
        ("0.4b", "nf4", "0.42", "0.25"),
    ]


@pytest.mark.parametrize(("size", "millions"), [("20m", 20.3), ("125m", 123.7), ("0.4b", 397.7)])
def test_a_models_size_matches_its_name(size: str, millions: float) -> None:
    # by hand, 0.4b: 24 layers · (4 · 1024² + 3 · 1024 · 3584) + 32000 words · 1024, counted once, because they are tied = 364.9 + 32.8 M
    hidden, layers, _, inner, words = bench_precision.SIZES[size]
    assert (layers * (4 * hidden**2 + 3 * hidden * inner) + words * hidden) / 1e6 == pytest.approx(millions, abs=0.05)


def test_more_nats_and_less_accuracy_are_worse() -> None:
    assert bench_precision.against(2.04, 2.0, "nats") == pytest.approx(0.02)  # relative: 2 % of the nats
    assert bench_precision.against(0.70, 0.71, "accuracy") == pytest.approx(0.01)  # absolute: one percentage point


def test_each_precision_is_compared_with_fp32_of_the_same_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = {"fp32": 0.0, "bf16": 0.0, "nf4": 0.03, "int8": 0.005}

    def run(overrides: list[str], key: str) -> list[tuple[int, float]]:
        given = dict(o.split("=") for o in overrides)
        off, seed = lost[given["model.precision"]], int(given["seed"])
        end = (2 + seed) * (1 + off) if key == "loss" else 0.5 + 0.1 * seed - off
        return [(0, 4.0), (1, 3.0), (2, end)]

    monkeypatch.setattr(bench_precision, "curve", run)
    out = tmp_path / "precision.md"
    monkeypatch.setattr(sys, "argv", ["bench_precision", "--text", "--seeds", "0", "1", "--out", str(out)])
    bench_precision.main()
    text = out.read_text()
    assert "\n## Quality on real text\n" in text and "![curves](precision.png)" in text
    assert (tmp_path / "precision.png").stat().st_size > 5000
    rows = {(r[0].split(",")[0], r[1]): r[3:6] for r in cells(capsys)[1:]}
    # by hand: nats 2 and 3 for fp32, mean 2.5, deviation sqrt(.5); nf4's are each 3 % above, whatever the seed
    assert rows["shakespeare", "fp32"] == ["2.500 ± 0.707", "0.0 ± 0.0 % of nats worse", "kept"]
    assert rows["shakespeare", "nf4"][1:] == ["3.0 ± 0.0 % of nats worse", "not kept"]
    assert rows["banking77", "nf4"][1:] == ["3.0 ± 0.0 points worse", "not kept"]
    assert rows["banking77", "int8"][1:] == ["0.5 ± 0.0 points worse", "kept"]


def test_a_curve_has_the_scores_of_the_global_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def simulate(config: Any) -> Path:
        assert config.seed == 3
        lines = ['{"round": 0, "client": null, "loss": 4.0}', '{"round": 1, "client": "a", "loss": 9.0}', '{"round": 1, "client": null}']
        (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"round": 2, "client": null, "loss": 3.0}']) + "\n")
        return tmp_path

    monkeypatch.setattr("fedtune.experiment.simulate", simulate)
    assert bench_precision.curve(["seed=3"], "loss") == [(0, 4.0), (2, 3.0)]


@pytest.mark.slow
def test_toy_cells_are_measured(tmp_path: Path) -> None:
    """By hand: 2048 words × 128, tied; 2 layers of 4 · 128² + 3 · 128 · 256; 5 norms of 128; less than 1 kB of rotary frequencies."""
    args = argparse.Namespace(compute="fp32", shape="2x16", steps=1, threads=1, checkpointing=False)
    bench_precision.in_process(args, "tiny", "fp32", str(tmp_path), "make")
    measurement = bench_precision.in_process(args, "tiny", "fp32", str(tmp_path), "step")
    entries = 2048 * 128 + 2 * (4 * 128**2 + 3 * 128 * 256) + 5 * 128
    assert measurement["weights MB"] == pytest.approx(4e-6 * entries, abs=1e-3)
    assert measurement["step MB"] >= measurement["libraries MB"] > 100 and measurement["step s"] > 0
    lean = bench_precision.in_process(args, "tiny", "fp32-lean", str(tmp_path), "step")
    assert lean["weights MB"] == measurement["weights MB"] and 0.1 < lean["PEFT / lean"] < 10
    assert lean["activations MB"] < 0.7 * measurement["activations MB"] and "PEFT / lean" not in measurement

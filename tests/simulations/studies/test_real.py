"""The study's tables, and one round on real data if available."""

import os
import sys
from pathlib import Path

import pytest

from fedtune.simulations.studies import real as study_real
from fedtune.simulations.studies.real import Result, mean_and_spread, plain_loop, read_scores, settings, table

DATA = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[3] / "../shared/data")).resolve()


def test_mean_and_spread_is_the_sample_standard_deviation() -> None:
    # by hand: mean of 1, 2, 6 is 3; squares 4 + 1 + 9 = 14; sqrt(14 / 2) = 2.6458
    assert mean_and_spread([1.0, 2.0, 6.0]) == "3.000 ± 2.646"
    assert mean_and_spread([0.5]) == "0.500"


def test_the_table_has_a_row_a_setting_over_its_seeds() -> None:
    results = [
        Result(setting="a", seed=0, seconds=10.0, scores={"accuracy after": 0.5}),
        Result(setting="b", seed=0, seconds=7.0, scores={"accuracy after": 0.25}),
        Result(setting="a", seed=1, seconds=20.0, scores={"accuracy after": 0.7}),
    ]
    # by hand: mean .6, deviations ±.1, sqrt(.02 / 1) = .141
    assert table(results).splitlines() == [
        "| setting | seeds | accuracy after | seconds per run |",
        "|---|---|---|---|",
        "| a | 0 1 | 0.600 ± 0.141 | 15 |",
        "| b | 0 | 0.250 | 7 |",
    ]
    assert table(results, {"a": "4.43 → 3.02"}).splitlines()[2].endswith("| 15 | 4.43 → 3.02 |")


def test_scores_are_those_of_round_0_and_the_last_round() -> None:
    records = [
        {"round": 0, "client": "c", "loss": 9.0},
        {"round": 0, "client": None, "loss": 4.0},
        {"round": 1, "client": None, "loss": 3.0},
        {"round": 2, "client": None, "loss": 2.0, "clients_mean": 8.0, "clients_worst_decile": 11.0},
    ]
    assert read_scores(records) == {"nats before": 4.0, "nats after": 2.0, "clients' perplexity": 8.0, "of the worst tenth": 11.0}


def test_the_shakespeare_table_includes_the_plain_loop_if_it_was_run() -> None:
    rows = settings("shakespeare", [10, 30, 40], ["pretrained", "random"], [])
    assert [r.overrides[0] for r in rows] == ["rounds=10", "rounds=30", "rounds=40", "rounds=40"]
    assert plain_loop(rows) == {
        "pretrained, 10 rounds": "4.43 → 3.02",
        "pretrained, 40 rounds": "4.43 → 2.83",
        "random, 40 rounds": "6.25 → 5.92",
    }


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "fed/tinyshakespeare").is_dir(), reason="needs FEDTUNE_DATA with fed/tinyshakespeare and stories260k")
def test_one_round_reduces_the_speakers_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_DATA", str(DATA))
    few = ["clients_per_round=4", "data.test_limit=50", "eval.clients=0", "engine.threads=1", "engine.batched=none"]
    argv = ["study_real", "shakespeare", "--seeds", "0", "--rounds", "1", "--out", str(tmp_path / "t.md")]
    monkeypatch.setattr(sys, "argv", [*argv, "--set", *few, f"output_dir={tmp_path}"])
    study_real.main()
    text = (tmp_path / "t.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    trained = dict(zip(rows[0], rows[2], strict=True))
    assert trained["setting"] == "pretrained, 1 rounds"
    assert float(trained["nats after"]) < float(trained["nats before"]) - 0.3
    assert float(trained["words before"]) < float(trained["nats before"]), "the untuned model knows words better than the marks"
    untrained = dict(zip(rows[0], rows[3], strict=True))
    assert float(untrained["nats before"]) > 6.0

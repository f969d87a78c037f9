"""`fedtune compare`: means, deviations and paired differences that can be checked by hand."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from fedtune.cli.main import main
from fedtune.config import to_dict
from fedtune.config.compose import compose
from fedtune.errors import CheckpointError, ConfigError
from fedtune.runs.directory import read_config
from fedtune.runs.report import compare as module
from fedtune.runs.report.compare import Comparison, markdown, spread, table_csv


def run(
    folder: Path, seed: int, accuracy: float, *more: str, clients: tuple[float, ...] = (), metric: str = "accuracy", done: int = 2
) -> Path:
    config = compose([f"seed={seed}", "rounds=2", *more])[0].config
    path = folder / f"run-{len(list(folder.iterdir()))}"
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    lines = [{"round": r, "client": None, metric: accuracy * r / 2, "bytes_up": 1e6, "seconds": 3.0} for r in range(done + 1)]
    lines += [{"round": 2, "client": f"c{i}", metric: v} for i, v in enumerate(clients)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def compare(paths: Sequence[Path], metric: str | None = None) -> Comparison:
    return module.compare({p: read_config(p) for p in paths}, metric)


def test_means_and_paired_differences_by_hand(tmp_path: Path) -> None:
    a = [run(tmp_path, s, v, "strategy=fedavg", clients=(v, v - 0.2)) for s, v in ((0, 0.2), (1, 0.4), (2, 0.6))]
    b = [run(tmp_path, s, v, "strategy=flora") for s, v in ((2, 0.9), (0, 0.3))]
    comparison = compare([*a, *b])
    assert [s.label for s in comparison.settings] == ["strategy=FedAvg", "strategy=FLoRA"]
    rows = comparison.rows()
    # fedavg: mean .4, std √((.04 + 0 + .04) / 2) = .2; flora: mean .6, std √(.09 + .09) = .424
    assert rows[0][1:4] == ["3", "0.400 ± 0.200", "–"]
    # pairs: seed 0: .3 - .2 = .1, seed 2: .9 - .6 = .3; mean .2, std √(.01 + .01) = .141. Unpaired it would be .6 - .4 with std .47
    assert rows[1][1:4] == ["2", "0.600 ± 0.424", "+0.200 ± 0.141 (2)"]
    assert rows[0][4] == "0.300 ± 0.200"  # the mean of both clients: .1, .3, .5
    assert rows[0][5] == "0.200 ± 0.200"  # the worse client of each: 0, .2, .4
    assert rows[0][6] == "3.000 ± 0.000"  # three round lines of 1 MB
    assert "gain" not in comparison.columns


def test_any_key_but_the_seed_distinguishes_settings(tmp_path: Path) -> None:
    comparison = compare([run(tmp_path, s, 0.5, f"client.lr={lr}", f"peft.rank={r}") for s in (0, 1) for lr, r in ((1e-3, 4), (2e-3, 8))])
    assert [(s.label, sorted(s.runs)) for s in comparison.settings] == [("peft.rank=4", [0, 1]), ("peft.rank=8", [0, 1])]
    assert comparison.also == ["client.lr"] and "Settings also differ in these keys: client.lr." in comparison.notes()


def test_markdown_and_csv_contain_every_run(tmp_path: Path) -> None:
    comparison = compare([run(tmp_path, s, 0.5 + s / 4) for s in (0, 1)])
    rows = list(csv.DictReader(table_csv(comparison).splitlines()))
    assert [(r["setting"], r["seed"], r["accuracy"], r["MB up"]) for r in rows] == [
        ("all runs", "0", "0.5", "3.0"),
        ("all runs", "1", "0.75", "3.0"),
    ]
    text = markdown(comparison, "rounds=2")
    assert "| all runs | 2 | 0.625 ± 0.177 | – |" in text and "Common to all: `rounds=2`." in text


def test_the_notes_say_that_a_lower_loss_is_better(tmp_path: Path) -> None:
    comparison = compare([run(tmp_path, 0, 2.0, metric="loss")])
    assert comparison.metric == "loss" and "lower is better" in comparison.notes()[0]


def test_runs_that_cannot_be_compared_give_a_one_sentence_error(tmp_path: Path) -> None:
    good, other = run(tmp_path, 0, 0.5), run(tmp_path, 1, 0.5, metric="loss")
    with pytest.raises(ConfigError, match=r"the runs report different metrics \(accuracy, loss\): choose one that all have with --metric"):
        compare([good, other])
    with pytest.raises(ConfigError, match=f"{other} does not report accuracy: choose another --metric"):
        compare([good, other], "accuracy")
    twin = run(tmp_path, 0, 0.7)
    with pytest.raises(ConfigError, match=f"{good} and {twin} have the same settings and seed 0: leave one out"):
        compare([good, twin])
    part = run(tmp_path, 3, 0.7, done=1)
    with pytest.raises(ConfigError, match=f"{part} has done 1 of 2 rounds: finish it with resume={part}, or leave it out"):
        compare([good, part])
    with pytest.raises(ConfigError, match="there is no run to compare"):
        compare([])
    with pytest.raises(CheckpointError, match="cannot be read"):
        (good / "metrics.jsonl").unlink()
        compare([good])


def test_the_command_prints_eighty_columns_and_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    paths = [run(tmp_path / "runs", s, 0.5, f"strategy={x}", "peft=lora") for s in (0, 1) for x in ("fedavg", "fedadam")]
    assert main(["compare", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    # both have the same value for each seed; FedAdam's own settings belong to its name
    assert max(map(len, out.splitlines()[:-1])) <= 80 and "…" not in out and "beta" not in out
    assert " 2  strategy=FedAdam\n" in out and "0.000 ± 0.000 (2)" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.csv", "compare.md", "compare.png"]
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_one_value_has_no_deviation() -> None:
    assert (spread([]), spread([0.5]), spread([0.5], sign=True), spread([1.0, 2.0])) == ("–", "0.500", "+0.500", "1.500 ± 0.707")

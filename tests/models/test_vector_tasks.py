"""Multi-label classification and regression: rows of each form, losses and metrics by hand, and a run of each."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedtune.config import Config, DataConfig, EvalConfig, InferenceConfig, PartitionConfig, PrivacyConfig, TaskConfig, check
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.task import task_of
from fedtune.data import collate, encode, load_federation
from fedtune.data.hub import read_hub
from fedtune.errors import ConfigError, DataError, ModelError
from fedtune.experiment import simulate
from fedtune.inference.generate import read_card
from fedtune.models import LiveAdapter, load_backbone, loss_sum
from fedtune.models.evaluation import evaluate
from fedtune.runs.report import read_metrics
from fedtune.runs.report.summary import primary_metric
from tests.tiny import WORDS, texts, tiny_config

LABELS = TaskConfig(kind="multi_label", max_length=16)
NUMBERS = TaskConfig(kind="regression", max_length=16)
PAIRS = TaskConfig(kind="regression", max_length=16, outputs=2)


def local(path: Path, task: TaskConfig, **changes: Any) -> Config:
    data = DataConfig(source="local", path=str(path), test_fraction=0.0)
    return check(Config(task=task, data=data, partition=PartitionConfig(kind="iid", clients=1), **changes))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# -- rows ---------------------------------------------------------------------------------------------------------------------------------


def test_labels_come_as_lists_text_json_and_ids(tmp_path: Path) -> None:
    wanted = [bytes([1, 0, 1]), bytes([0, 0, 0]), bytes([0, 1, 0])]  # a, b, c
    rows: list[dict[str, Any]] = [{"text": "x", "labels": ["c", "a", "a"]}, {"text": "y", "labels": []}, {"text": "z", "labels": ["b"]}]
    (tmp_path / "a.csv").write_text('text,labels\nx,"c, a"\ny,\nz,b;\n')
    (tmp_path / "b.csv").write_text('text,labels\nx,"[""a"", ""c""]"\ny,[]\nz,|b\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    for row in rows:
        written(tmp_path / "folder" / f"{row['text']}.jsonl", [row])
    labeled = written(tmp_path / "b.jsonl", [{**row, "label": "other"} for row in rows])  # the task's own column counts
    for path in (written(tmp_path / "a.jsonl", rows), labeled, *(tmp_path / n for n in ("a.csv", "b.csv", "a.parquet", "folder"))):
        federation = load_federation(local(path, LABELS))
        assert federation.labels == ("a", "b", "c") and federation.rows["labels"][:] == wanted, path
        assert federation.summary()["clients"][0]["histogram"] == [1, 1, 1]


def test_the_hub_s_class_lists_have_their_names(tmp_path: Path) -> None:
    import datasets

    kinds = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=["joy", "fear", "awe"]))}
    )
    datasets.Dataset.from_dict({"text": ["x", "y"], "labels": [[2, 0], []]}, features=kinds).save_to_disk(str(tmp_path / "saved"))
    data = DataConfig(source="hub", name=str(tmp_path / "saved"), test_fraction=0.0)
    assert read_hub(data)[0].classes == {"labels": ("joy", "fear", "awe")}
    federation = load_federation(dataclasses.replace(local(tmp_path, LABELS), data=data))
    assert federation.labels == ("joy", "fear", "awe") and federation.rows["labels"][:] == [bytes([1, 0, 1]), bytes(3)]


def test_numbers_come_as_numbers_text_lists_and_json(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,target\nx,1.5\ny,-2\n")
    (tmp_path / "two.csv").write_text('text,target\nx,"[1.5, 3]"\ny,"[-2, 0]"\n')
    one, two = [[1.5], [-2.0]], [[1.5, 3.0], [-2.0, 0.0]]
    single = written(tmp_path / "single.jsonl", [{"text": "x", "target": 1.5}, {"text": "y", "target": [-2]}])
    double = written(tmp_path / "double.jsonl", [{"text": t, "target": v} for t, v in zip("xy", two, strict=True)])
    for path, task, rows in ((tmp_path / "one.csv", NUMBERS, one), (tmp_path / "two.csv", PAIRS, two), (double, PAIRS, two)):
        assert load_federation(local(path, task)).rows["target"][:] == rows
    with pytest.raises(DataError):  # Arrow has no column of numbers and lists
        load_federation(local(single, NUMBERS))


@pytest.mark.parametrize(
    ("task", "row", "sentence"),
    [
        (LABELS, {"labels": "[0.5]"}, r"training row 2 has the label float 0\.5, but a label is a name or a whole number"),
        (LABELS, {"labels": "['a', 'b']"}, r"row 2 has the labels .* which are not a JSON list: write"),
        (LABELS, {"labels": ["a", ""]}, r"training row 2 has an empty label"),
        (LABELS, {"labels": None}, r"training row 2 has no 'labels': fill it or remove the row$"),
        (LABELS, {"labels": ["a", "new"]}, r"training row 2 has the label 'new', but the classes are a, b: correct it or remove the row$"),
        (
            NUMBERS,
            {"target": "many"},
            r"row 2 of column 'target' is 'many', but .* at most 1e18: correct it or remove the row$",
        ),
        (NUMBERS, {"target": "nan"}, r"row 2 of column 'target' is 'nan', but 'target' must be a number of at most 1e18"),
        (NUMBERS, {"target": "1e30"}, r"row 2 of column 'target' is '1e30', but 'target' must be a number of at most 1e18"),
        (NUMBERS, {"target": None}, r"training row 2 has no 'target': fill it or remove the row$"),
        (NUMBERS, {"target": "[1, 2]"}, r"row 2 of column 'target' has 2 numbers, but task\.outputs=1: set task\.outputs to the numbers"),
        (NUMBERS, {"other": 1}, r"training row 2 has no 'target'"),
    ],
)
def test_a_bad_row_is_one_sentence(tmp_path: Path, task: TaskConfig, row: dict[str, Any], sentence: str) -> None:
    text = isinstance(row.get("labels"), str)
    good = {"text": "x", "labels": "a" if text else ["a", "b"], "target": "1"}
    config = local(written(tmp_path / "rows.jsonl", [good, {"text": "y", **row}]), task)
    config.data.labels = ["a", "b"]
    with pytest.raises(DataError, match=sentence) as caught:
        load_federation(config)
    assert "\n" not in str(caught.value)


def test_what_a_task_cannot_do_is_one_sentence(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", [{"text": "x", "labels": ["a"]}, {"text": "y", "labels": []}])
    with pytest.raises(DataError, match="every training row has the label 'a', but multi_label needs at least two classes"):
        load_federation(local(rows, LABELS))
    with pytest.raises(ConfigError, match=r"partition\.kind=dirichlet splits rows by their label, but .* take natural, iid or size"):
        check(dataclasses.replace(local(rows, LABELS), partition=PartitionConfig(kind="dirichlet")))
    with pytest.raises(ConfigError, match="the demo rows have no numbers"):
        check(Config(task=NUMBERS))


# -- losses and metrics by hand -----------------------------------------------------------------------------------------------------------


def measured(task: TaskConfig, logits: list[list[float]], targets: list[Any]) -> dict[str, float]:
    kind = task_of(task)
    scores = kind.score(torch.tensor(logits), torch.tensor(targets), [1] * len(logits), [], None)
    assert all(s.count == 1 for s in scores)
    return kind.summarize(scores)


def test_multi_label_by_hand() -> None:
    # predicted {0}, {0, 1}, {}; true {0, 2}, {1}, {}: 2 hits of 3 predicted and 3 true
    logits, targets = [[2.0, -1.0, -1.0], [0.4, 0.3, -9.0], [-1.0, -1.0, -1.0]], [[1.0, 0, 1], [0, 1, 0], [0, 0, 0]]
    found = measured(LABELS, logits, targets)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((2 * 1 / (1 + 2) + 2 * 1 / (1 + 1) + 0 / 1) / 3)
    assert found["exact_match"] == pytest.approx(1 / 3)
    # -log σ(x) for a true class, -log σ(-x) for another
    each = [
        math.log(1 + math.exp(-x if t else x)) for row, true in zip(logits, targets, strict=True) for x, t in zip(row, true, strict=True)
    ]
    assert found["loss"] == pytest.approx(sum(each) / 9)
    assert measured(LABELS, [[-1.0, -1.0]], [[0.0, 0]]) == {"loss": pytest.approx(math.log1p(math.exp(-1))), "micro_f1": 1, "macro_f1": 1,
                                                            "exact_match": 1}  # fmt: skip


def test_regression_by_hand() -> None:
    found = measured(NUMBERS, [[1.0], [2.0], [6.0]], [2.0, 2.0, 5.0])  # off by -1, 0, 1; the mean target is 3, the mean output 3
    assert found["loss"] == pytest.approx(2 / 3) and found["mae"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 2 / (1 + 1 + 4))
    assert found["pearson"] == pytest.approx((2 + 1 + 6) / math.sqrt((1 + 1 + 4) * (4 + 1 + 9)))
    # two outputs: means over them; the second is off by 2 in each row, with targets 0, 4 and outputs 2, 6
    found = measured(PAIRS, [[1.0, 2.0], [2.0, 6.0]], [[0.0, 0.0], [2.0, 4.0]])
    assert found["loss"] == pytest.approx((1 + 4 + 0 + 4) / 4) and found["mae"] == pytest.approx((1 + 2 + 0 + 2) / 4)
    assert found["r2"] == pytest.approx(((1 - 1 / 2) + (1 - 8 / 8)) / 2) and found["pearson"] == pytest.approx(1.0)


def test_a_metric_that_is_not_defined_is_left_out() -> None:
    assert measured(NUMBERS, [[1.0]], [3.0]) == {"loss": 4.0, "mae": 2.0}
    assert measured(NUMBERS, [[1.0], [2.0]], [3.0, 3.0]) == {"loss": 2.5, "mae": 1.5}
    assert measured(NUMBERS, [[1.0], [1.0]], [0.0, 2.0]) == {"loss": 1.0, "mae": 1.0, "r2": 0.0}
    assert set(measured(PAIRS, [[1.0, 1.0], [2.0, 2.0]], [[3.0, 1.0], [3.0, 2.0]])) == {"loss", "mae"}


@pytest.mark.parametrize(("task", "outputs"), [(LABELS, 3), (NUMBERS, 1), (PAIRS, 2)])
def test_the_loss_is_transformers_own(tmp_path: Path, task: TaskConfig, outputs: int) -> None:
    config = tiny_config(tmp_path, task=task)
    backbone = load_backbone(config.model, task, num_labels=outputs)
    rows = load_federation(local(written(tmp_path / "own.jsonl", some_rows(task)), task)).rows
    examples = encode(rows, np.arange(len(rows)), backbone.tokenizer, task)
    batch = collate(examples, backbone.tokenizer.pad_token_id)
    total, count = loss_sum(backbone.model, batch, task)
    assert count == len(rows)
    torch.testing.assert_close(total / count, backbone.model(**batch).loss, rtol=1e-5, atol=1e-6)
    one, all_ = (evaluate(backbone.model, backbone.tokenizer, examples, task, batch_size=n) for n in (1, 8))
    assert one == pytest.approx(all_, rel=1e-4)


def some_rows(task: TaskConfig) -> list[dict[str, Any]]:
    rows = []
    for row in texts(24):
        words = row["text"].split()
        number: Any = (len(words) - 5) / 2
        target = number if task.outputs == 1 else [number, float(WORDS.index(words[0])) / 10]
        rows.append({"text": row["text"], "client": row["client"], "labels": sorted({*words} & {"lamp", "door", "cat"}), "target": target})
    return rows


# -- runs ---------------------------------------------------------------------------------------------------------------------------------


def experiment(folder: Path, task: TaskConfig, **changes: Any) -> Config:
    config = tiny_config(folder, some_rows(task), task=task, **{"eval": EvalConfig(where="server", clients=-1), **changes})
    data = {"path": config.data.path, "test_path": None, "test_fraction": 0.2}
    return check(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))


@pytest.mark.parametrize(
    ("task", "metric", "problem", "says"),
    [
        (LABELS, "micro_f1", "multi_label_classification", "is a classifier: it outputs labels, not text"),
        (PAIRS, "mae", "regression", "is a regressor: it outputs numbers, not text"),
    ],
    ids=["multi_label", "regression"],
)
def test_a_run_ends_in_a_report_and_a_model_that_transformers_loads(
    tmp_path: Path, task: TaskConfig, metric: str, problem: str, says: str
) -> None:
    run = simulate(experiment(tmp_path, task, inference=InferenceConfig(export="hf")))
    records = read_metrics(run)
    first, _, last = rounds = [r for r in records if r.get("client") is None]
    own = [r[metric] for r in records if r.get("client") is not None and r["round"] == 2]
    assert primary_metric(records) == metric and all({"loss", metric, "clients_mean"} <= set(r) for r in rounds)
    assert last["loss"] < first["loss"]
    assert last["clients_worst_decile"] == pytest.approx(max(own) if metric == "mae" else min(own))
    assert ("lower" if metric == "mae" else "higher") + " is better" in (run / "report.html").read_text(encoding="utf-8")
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    assert merged.config.problem_type == problem
    if metric == "micro_f1":
        assert merged.config.id2label == {0: "cat", 1: "door", 2: "lamp"}
    with pytest.raises(ModelError, match=says):
        read_card(run / "merged")
    tokens = AutoTokenizer.from_pretrained(run / "merged")("lamp kettle door", return_tensors="pt").input_ids
    config = experiment(tmp_path, task)
    live = LiveAdapter(load_backbone(config.model, task, num_labels=merged.config.num_labels, seed=config.seed), config.peft, task)
    live.load(AdapterState.load(run / "adapter" / "fedtune.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, live.model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", [LABELS, NUMBERS, PAIRS], ids=["multi_label", "number", "numbers"])
@pytest.mark.parametrize("privacy", ["record", "user"])
def test_private_runs(tmp_path: Path, task: TaskConfig, privacy: str) -> None:
    config = experiment(tmp_path, task, rounds=1, privacy=PrivacyConfig(kind=privacy, noise=1.0))
    config.data.labels = ["cat", "door", "lamp"] if task is LABELS else []
    last = [r for r in read_metrics(simulate(check(config))) if r.get("client") is None][-1]
    assert last["counted"] == 4 and math.isfinite(last["loss"])

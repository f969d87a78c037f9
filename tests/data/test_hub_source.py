"""Hub data sets, without a hub: folders that `datasets` wrote, and a library that raises."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from fedtune.config import from_dict
from fedtune.data import load_federation
from fedtune.errors import DataError

FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "sports"])})


def rows(n: int, label: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(n)], "label": [label] * n}, features=FEATURES)


def load(name: Path | str, **data: Any) -> Any:
    values = {
        "data": {"source": "hub", "name": str(name), **data},
        "task": {"kind": "classification"},
        "partition": {"kind": "iid", "clients": 2},
    }
    return load_federation(from_dict(values))


def test_a_saved_data_set_with_its_own_class_names_and_test_split(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": rows(8, label=1), "test": rows(3, label=0)}).save_to_disk(tmp_path / "news")
    federation = load(tmp_path / "news", test_split="test")
    assert (len(federation.rows), len(federation.test), federation.labels) == (8, 3, ("world", "sports"))
    assert set(federation.rows["label"]) == {1}  # ids of the data set, although no training row is "world"
    assert set(federation.test["label"]) == {0}


def test_a_single_saved_split_is_divided(tmp_path: Path) -> None:
    rows(10).save_to_disk(tmp_path / "one")
    federation = load(tmp_path / "one")
    assert (len(federation.rows), len(federation.test)) == (9, 1)
    with pytest.raises(DataError, match="is a single split, without data.test_split=test: set it to null"):
        load(tmp_path / "one", test_split="test")


def test_load_dataset_gets_name_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        seen.append((name, subset, split))
        return rows(5)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    load("glue", subset="sst2", split="train", test_split="validation")
    assert seen == [("glue", "sst2", "train"), ("glue", "sst2", "validation")]


def test_a_folder_of_parquet_by_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    rows(6).to_parquet(tmp_path / "mine" / "train.parquet")
    assert len(load(tmp_path / "mine", test_fraction=0.0).rows) == 6


@pytest.mark.parametrize("bad", [ConnectionError("Couldn't reach the Hub\nlong story"), ValueError("Unknown split 'dev'"), OSError()])
def test_every_library_error_becomes_a_one_sentence_error(monkeypatch: pytest.MonkeyPatch, bad: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise bad

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=rf"cannot load data.name=ag_news split 'train': {type(bad).__name__}: .*use data=local") as caught:
        load("ag_news")
    assert "\n" not in str(caught.value)


def test_a_label_of_minus_one_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=FEATURES).save_to_disk(tmp_path / "hidden")
    with pytest.raises(DataError, match="training row 1 has class id -1, but there are 2 classes: remove the row"):
        load(tmp_path / "hidden", test_fraction=0.0)


def test_missing_splits_and_empty_data_sets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.DatasetDict({"train": rows(2), "more": rows(2)}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="has no split 'dev': choose from train, more"):
        load(tmp_path / "d", test_split="dev")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows(0))
    with pytest.raises(DataError, match="data.name=empty split 'train' has no rows"):
        load("empty")

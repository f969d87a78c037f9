"""The data that one machine of a federation loads: a device its own rows, a coordinator the global test."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import Config, from_dict, to_dict
from fedtune.data import Federation, load_federation, load_test
from fedtune.errors import ConfigError, DataError

TEXTS = {"anna": ["a b", "c d", "e f", "g h", "i j"], "bert": ["k l", "m n", "o p"]}
LABELS = {"anna": ["no", "yes", "no", "yes", "no"], "bert": ["maybe", "maybe", "maybe"]}


def write(folder: Path) -> None:
    folder.mkdir()
    for name, texts in TEXTS.items():
        rows = [json.dumps({"text": t, "label": label}) for t, label in zip(texts, LABELS[name], strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def config(folder: Path, **data: Any) -> Config:
    values = to_dict(Config())
    values["data"] |= {"source": "local", "path": str(folder), "client_from_file": True, "test_fraction": 0.0, "held_out": 0.4} | data
    values["task"]["kind"] = "classification"
    return from_dict(values)


def rows_of(federation: Federation, client: str) -> tuple[list[Any], list[Any]]:
    held = federation.clients[client]
    return tuple(  # type: ignore[return-value]
        [(federation.rows[int(i)]["text"], federation.rows[int(i)]["label"]) for i in part] for part in (held.train, held.held_out)
    )


def test_a_device_with_its_own_file_has_the_rows_of_its_simulated_client(tmp_path: Path) -> None:
    write(tmp_path / "all")
    whole = load_federation(config(tmp_path / "all"))
    assert whole.labels == ("maybe", "no", "yes")
    for name in TEXTS:
        own = config(tmp_path / "all" / f"{name}.jsonl", client=name, labels=list(whole.labels), client_from_file=False)
        own = dataclasses.replace(own, partition=dataclasses.replace(own.partition, kind="one"))
        alone = load_federation(own)
        assert list(alone.clients) == [name]
        assert rows_of(alone, name) == rows_of(whole, name)


def test_without_its_own_file_a_device_uses_its_part_of_the_scenario(tmp_path: Path) -> None:
    write(tmp_path / "all")
    whole, alone = load_federation(config(tmp_path / "all")), load_federation(config(tmp_path / "all", client="bert"))
    assert list(alone.clients) == ["bert"]
    assert rows_of(alone, "bert") == rows_of(whole, "bert")
    with pytest.raises(DataError, match="client 'carl' has no rows in this scenario, whose clients are anna, bert"):
        load_federation(config(tmp_path / "all", client="carl"))


def test_a_device_class_does_not_depend_on_the_other_clients() -> None:
    values = to_dict(Config())
    values["partition"] |= {"kind": "iid", "clients": 6}
    values["devices"]["classes"] = {"small": {"share": 0.5}, "large": {"share": 0.5}}
    whole = load_federation(from_dict(values))
    values["data"]["client"] = "client-004"
    alone = load_federation(from_dict(values))
    assert alone.clients["client-004"].device_class == whole.clients["client-004"].device_class
    np.testing.assert_array_equal(alone.clients["client-004"].train, whole.clients["client-004"].train)


def test_a_coordinator_without_training_rows_has_the_test_and_the_names_of_the_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "a b", "label": "yes"}\n{"text": "c d", "label": "no"}\n')
    held = load_test(config(tmp_path / "nowhere", test_path=str(tmp_path / "test.jsonl")))
    assert (held.labels, len(held.test), dict(held.clients)) == (("no", "yes"), 2, {})
    named = load_test(config(tmp_path / "nowhere", labels=["yes", "no"]))
    assert (named.labels, len(named.test)) == (("yes", "no"), 0)
    both = load_test(config(tmp_path / "nowhere", labels=["yes", "no"], test_path=str(tmp_path / "test.jsonl")))
    assert both.test["label"][:] == [0, 1]
    assert "nowhere is not on this machine: the server has no training rows" in caplog.text
    with pytest.raises(ConfigError, match="set data.labels"):
        load_test(config(tmp_path / "nowhere"))


ROW = {"text": "a b", "label": "no", "prompt": "a", "answer": "b"}


@pytest.mark.parametrize("task", ["classification", "instruction", "causal_lm"])
@pytest.mark.parametrize("kind", ["natural", "iid", "dirichlet", "pathological", "size", "prior"])
def test_a_coordinator_needs_neither_rows_nor_a_partition(tmp_path: Path, task: str, kind: str) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("\n".join(json.dumps(ROW | {"label": label}) for label in ("no", "yes")))
    for path, test_path, labels in itertools.product(("", "nowhere", str(test)), (None, str(test)), ([], ["no", "yes"])):
        if path == str(test) == test_path:
            continue  # all rows are test rows
        values = to_dict(Config())
        values["data"] |= {"source": "local", "path": path, "test_path": test_path, "labels": labels, "test_fraction": 0.5}
        values["task"]["kind"], values["partition"]["kind"] = task, kind
        if task == "classification" and path != str(test) and test_path is None and not labels:
            with pytest.raises(ConfigError, match="set data.labels"):
                load_test(from_dict(values))
            continue
        held = load_test(from_dict(values))
        assert len(held.test) == (2 if test_path else 1 if path == str(test) else 0)
        assert set(held.test.column_names) >= {"classification": {"text", "label"}, "instruction": {"prompt", "answer"}}.get(task, {"text"})
        assert held.summary() == {"labels": list(held.labels), "clients": [], "test": len(held.test)}
        assert held.row_labels().shape == (0,)
        if task == "classification":
            assert held.labels == ("no", "yes")
            assert [held.labels[i] for i in held.test["label"][:]] in (["no", "yes"], ["no"], ["yes"], [])


def test_a_simulation_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="data=local needs data.path: a file, a folder or a glob"):
        load_federation(from_dict({"data": {"source": "local"}}))


def test_a_coordinator_has_the_same_test_as_a_simulation(tmp_path: Path) -> None:
    write(tmp_path / "all")
    for kind, least in (("natural", 1), ("natural", 4), ("iid", 1), ("dirichlet", 1)):
        values = to_dict(config(tmp_path / "all", test_fraction=0.4, labels=["maybe", "no", "yes"]))
        values["partition"] |= {"kind": kind, "min_examples": least, "clients": 2}
        assert load_test(from_dict(values)).test[:] == load_federation(from_dict(values)).test[:]


def test_class_names_without_a_label_column_give_no_histogram(tmp_path: Path) -> None:
    write(tmp_path / "all")
    values = to_dict(config(tmp_path / "all", labels=["no", "yes"], columns={"label": "kind"}))
    values["task"]["kind"] = "causal_lm"
    del values["data"]["columns"]["label"]
    for file in (tmp_path / "all").iterdir():
        file.write_text('{"text": "a"}\n' * 3)
    assert [c["histogram"] for c in load_federation(from_dict(values)).summary()["clients"]] == [[], []]


def test_a_coordinator_with_the_rows_keeps_no_client(tmp_path: Path) -> None:
    write(tmp_path / "all")
    held = load_test(config(tmp_path / "all"))
    assert (held.labels, dict(held.clients)) == (("maybe", "no", "yes"), {})


def test_a_single_client_needs_an_id(tmp_path: Path) -> None:
    values = to_dict(Config())
    values["partition"]["kind"] = "one"
    with pytest.raises(ConfigError, match="data.client"):
        from_dict(values)

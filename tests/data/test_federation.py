"""From a config to rows, global test, clients, held-out parts and device classes; with small files and results by hand."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import DataConfig, DeviceClass, from_dict
from fedtune.data import Federation, load_federation
from fedtune.data.federation import deal, split
from fedtune.data.values import in_order
from fedtune.errors import DataError
from fedtune.export.origin import prompt_template


def load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> Federation:
    (path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values: dict[str, Any] = {"task": {"kind": "classification"}, "partition": {"kind": "iid", "clients": 4}} | settings
    return load_federation(from_dict(values | {"data": {"source": "local", "path": str(path / "rows.jsonl")} | settings.get("data", {})}))


def plain(n: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": ["no", "yes"][i % 2], "client": f"c{i % 5}"} for i in range(n)]


def signature(federation: Federation) -> Any:
    return {name: (client.train.tolist(), client.held_out.tolist()) for name, client in federation.clients.items()}, federation.test[
        "text"
    ][:]


def test_test_clients_and_held_out_rows_share_nothing_and_lose_nothing(tmp_path: Path) -> None:
    federation = load(tmp_path, plain(40), data={"test_fraction": 0.1, "held_out": 0.25})
    assert (len(federation.rows), len(federation.test)) == (36, 4)
    dealt = np.concatenate([np.concatenate([c.train, c.held_out]) for c in federation.clients.values()])
    assert sorted(dealt.tolist()) == list(range(36))
    assert sorted(federation.rows["text"][:] + federation.test["text"][:]) == sorted(f"text {i}" for i in range(40))
    # 36 rows to 4 clients: 9 each, and int(9 * .25 + .5) = 2 of each are held out
    assert [(len(c.train), len(c.held_out)) for c in federation.clients.values()] == [(7, 2)] * 4
    assert federation.clients["client-000"].train.dtype == np.int64


def test_the_seed_determines_the_split(tmp_path: Path) -> None:
    one, same, other = (signature(load(tmp_path, plain(), seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_client_s_split_does_not_depend_on_the_others(tmp_path: Path) -> None:
    settings = {"partition": {"kind": "natural"}, "data": {"test_fraction": 0.0}}
    rows = sorted(plain(), key=lambda row: row["client"])
    all_five = load(tmp_path, rows, **settings)
    first_two = load(tmp_path, rows[:16], **settings)
    assert list(first_two.clients) == ["c0", "c1"]
    assert all(all_five.clients[name].held_out.tolist() == client.held_out.tolist() for name, client in first_two.clients.items())


def test_clients_of_one_size_hold_out_different_rows(tmp_path: Path) -> None:
    federation = load(tmp_path, sorted(plain(), key=lambda row: row["client"]), partition={"kind": "natural"}, data={"test_fraction": 0.0})
    # each client's 8 rows are adjacent
    places = {tuple(client.held_out - 8 * i) for i, client in enumerate(federation.clients.values())}
    assert len(places) > 1


def test_the_summary_of_a_federation(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": label, "client": client} for i, (label, client) in enumerate(["nb", "na", "ya", "na"])]
    federation = load(tmp_path, rows, partition={"kind": "natural"}, data={"test_fraction": 0.0, "held_out": 0.4})
    assert federation.summary() == {
        "labels": ["n", "y"],
        "test": 0,
        "clients": [
            {"id": "a", "device_class": "", "train": 2, "held_out": 1, "histogram": [2, 1]},
            {"id": "b", "device_class": "", "train": 1, "held_out": 0, "histogram": [1, 0]},  # a single row is a training row
        ],
    }
    json.dumps(federation.summary())


def test_limits_sample_rows(tmp_path: Path) -> None:
    federation = load(tmp_path, plain(), data={"limit": 12, "test_limit": 2})
    assert (len(federation.rows), len(federation.test)) == (12, 2)
    assert not set(federation.rows["text"][:]) & set(federation.test["text"][:])


def test_a_test_file_has_the_labels_of_the_training_rows(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "t", "label": "yes"}')
    federation = load(tmp_path, plain(), data={"test_path": str(tmp_path / "test.jsonl")})
    assert (len(federation.rows), federation.test["text"][:], federation.test["label"][:]) == (40, ["t"], [1])
    assert federation.labels == ("no", "yes")


def test_numeric_labels_are_ordered_by_value(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": label} for label in ("10", "9", "-1", "9")]
    federation = load(tmp_path, rows, partition={"kind": "iid", "clients": 1})
    assert federation.labels == ("-1", "9", "10")


def test_labels_of_one_value_are_ordered_by_their_text() -> None:
    names = [zeros + str(value) for value in range(1, 6) for zeros in ("000", "00", "0", "")]
    assert in_order(names[::-1]) == tuple(names)  # a set alone would order equal values by the process's hash seed
    assert in_order(["1", "x", "01", "1"]) == ("01", "1", "x")


def test_surrounding_blanks_do_not_distinguish_classes_or_clients(tmp_path: Path) -> None:
    rows = [
        {"text": "t", "label": label, "client": client, "device_class": device}
        for label, client, device in [("x", "a", "phone"), ("x ", "a ", "phone "), ("\u00a0y", "\ta", "phone"), ("y", "b", "phone")]
    ]
    settings = {"partition": {"kind": "natural"}, "devices": {"classes": {"phone": {}}}}
    federation = load(tmp_path, rows, data={"test_fraction": 0.0}, **settings)
    assert federation.labels == ("x", "y")
    assert list(federation.clients) == ["a", "b"]
    (tmp_path / "test.jsonl").write_text('{"text": "t", "label": "y\\t"}')
    federation = load(tmp_path, rows, data={"test_path": str(tmp_path / "test.jsonl"), "labels": ["y ", "x"]}, **settings)
    assert (federation.labels, federation.test["label"][:]) == (("y", "x"), [0])


@pytest.mark.parametrize("blank", [" ", "\u00a0"])
def test_a_file_named_with_a_blank_is_the_same_client(tmp_path: Path, blank: str) -> None:
    for i, name in enumerate(("ann", f"ann{blank}")):
        (tmp_path / f"{name}.txt").write_text(f"row {i}\n")
    with pytest.raises(DataError, match="are both client 'ann'"):
        load_federation(from_dict(
            {"task": {"kind": "causal_lm"}, "data": {"source": "local", "path": str(tmp_path), "client_from_file": True}}
        ))  # fmt: skip


def test_a_template_writes_line_breaks_as_in_the_help(tmp_path: Path) -> None:
    shown = re.findall(r"such as '(.+)'", DataConfig.__dataclass_fields__["prompt"].metadata["help"])
    assert shown == [r"Q: {question}\nA:"]
    rows = [{"question": f"why {i}", "a": "so"} for i in range(4)]
    data = {"prompt": shown[0], "answer": r" {a}\\n\tb", "columns": {"client": r"c\\{a}"}, "test_fraction": 0.0}
    federation = load(tmp_path, rows, task={"kind": "instruction"}, partition={"kind": "natural"}, data=data)
    assert federation.rows["prompt"][0] == "Q: why 0\nA:"
    assert federation.rows["answer"][0] == " so\\n\tb"  # two backslashes are one
    assert list(federation.clients) == ["c\\so"]
    assert prompt_template(from_dict({"data": data})) == "Q: {question}\nA:"  # the export's card shows this


def test_an_unused_column_may_have_any_values(tmp_path: Path) -> None:
    odd = [{"id": 1, "label": 1, "meta": "\ud83d"}, {"id": "b", "label": "y", "meta": 2}, {"id": [3], "label": "z", "meta": {}}]
    rows = [{"text": "abc"[i]} | odd[i] for i in range(3)]
    one = {"partition": {"kind": "iid", "clients": 1}, "data": {"test_fraction": 0.0}}
    federation = load(tmp_path, rows, task={"kind": "causal_lm"}, **one)
    assert federation.rows.column_names == ["text"]
    with pytest.raises(DataError, match=r"rows\.jsonl: column 'label' has values of several types .*: give all its values one type"):
        load(tmp_path, rows, data={"test_fraction": 0.0})
    with pytest.raises(DataError, match=r"rows\.jsonl: column 'id' has values of several types"):
        load(tmp_path, rows, task={"kind": "causal_lm"}, data={"columns": {"client": "id"}})
    with pytest.raises(DataError, match=r"data\.columns\.text\), only text, id, label, meta: correct the name$"):
        load(tmp_path, rows, task={"kind": "causal_lm"}, data={"columns": {"text": "body"}})


def test_templates_and_columns_define_the_rows(tmp_path: Path) -> None:
    rows = [{"q": f"why {i}", "a": {"text": i}, "kind": "open"} for i in range(10)]
    data = {"prompt": "Q: {q}\nA:", "answer": " {a[text]}", "columns": {"label": "kind"}, "test_fraction": 0.0}
    federation = load(tmp_path, rows, task={"kind": "instruction"}, data=data)
    assert federation.rows.column_names == ["prompt", "answer", "label"]
    assert federation.labels == ("open",)  # for histograms and label partitions
    assert ("Q: why 3\nA:", " 3") in zip(federation.rows["prompt"][:], federation.rows["answer"][:], strict=True)
    pairs = load(tmp_path, [r | {"label": i % 2} for i, r in enumerate(rows)], data={"columns": {"text": "{q} / {kind}"}})
    assert "why 3 / open" in pairs.rows["text"][:] + pairs.test["text"][:]


def test_blank_texts_are_not_training_rows_of_a_language_model(tmp_path: Path) -> None:
    federation = load(
        tmp_path, [{"text": t} for t in ("a", "", " \n", "b", "c")], task={"kind": "causal_lm"}, partition={"kind": "iid", "clients": 1}
    )
    assert sorted(federation.rows["text"][:] + federation.test["text"][:]) == ["a", "b", "c"]


def test_small_speakers_are_removed_before_the_test_is_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"{who} {i}", "client": who} for who, n in (("big", 10), ("ten", 10), ("small", 9)) for i in range(n)]
    with caplog.at_level(logging.WARNING, "fedtune.data"):
        federation = load(
            tmp_path, rows, task={"kind": "causal_lm"}, partition={"kind": "natural", "min_examples": 10}, data={"test_fraction": 0.5}
        )
    assert list(federation.clients) == ["big", "ten"]
    assert len(federation.rows) == len(federation.test) == 10
    assert not [text for text in federation.test["text"][:] if text.startswith("small")]
    assert "1 of 3 clients have fewer than 10 rows" in caplog.text


def test_unused_columns_may_have_gaps(tmp_path: Path) -> None:
    rows = [{"text": "a", "client": None, "label": None}, {"text": "b", "client": "x", "label": "y"}] * 5
    federation = load(tmp_path, rows, task={"kind": "causal_lm"})
    assert federation.rows.column_names == ["text"]


# -- devices ------------------------------------------------------------------------------------------------------------------------------

CLASSES = {"phone": {"share": 3, "max_examples": 2}, "laptop": {"share": 1}}


def test_devices_are_assigned_by_their_shares_and_limit_the_training_rows(tmp_path: Path) -> None:
    federation = load(tmp_path, plain(), devices={"classes": CLASSES}, data={"test_fraction": 0.0})
    assert sorted(c.device_class for c in federation.clients.values()) == ["laptop", "phone", "phone", "phone"]
    for client in federation.clients.values():  # 10 rows a client: 2 held out, 8 to train on
        assert (len(client.train), len(client.held_out)) == ((2 if client.device_class == "phone" else 8), 2)
        assert not set(client.train) & set(client.held_out)


def test_the_data_gives_the_device_class_of_a_natural_client(tmp_path: Path) -> None:
    rows = [row | {"device_class": "laptop" if row["client"] == "c1" else "phone"} for row in plain()]
    federation = load(tmp_path, rows, partition={"kind": "natural"}, devices={"classes": CLASSES})
    classes = {name: c.device_class for name, c in federation.clients.items()}
    assert classes == dict.fromkeys(["c0", "c2", "c3", "c4"], "phone") | {"c1": "laptop"}


def test_device_classes_are_dealt_by_largest_remainder() -> None:
    dealt = deal({"a": DeviceClass(share=0.5), "b": DeviceClass(share=0.3), "c": DeviceClass(share=0.2), "d": DeviceClass(share=0.0)}, 7, 0)
    # 7 * (.5, .3, .2) = 3.5, 2.1, 1.4: floors 3, 2, 1 and the one left over goes to the largest remainder, a
    assert sorted(dealt) == list("aaaabbc")


@pytest.mark.parametrize(("rows", "share", "taken"), [(1, 0.5, 0), (2, 0.2, 1), (10, 0.25, 3), (10, 0.0, 0), (2, 0.9, 1), (0, 0.5, 0)])
def test_a_split_has_the_rounded_share_of_the_rows(rows: int, share: float, taken: int) -> None:
    out, kept = split(rows, share, 0)
    assert (len(out), len(kept)) == (taken, rows - taken)
    assert sorted([*out, *kept]) == list(range(rows))


# -- the demo -----------------------------------------------------------------------------------------------------------------------------


def test_the_demo_has_homes_a_test_and_labels() -> None:
    federation = load_federation(from_dict({"seed": 3}))
    assert len(federation.clients) >= 20
    assert federation.rows["prompt"][0].startswith("Request: ") and federation.rows["prompt"][0].endswith("\nAction:")
    assert federation.rows["answer"][0].startswith(" ")
    assert len(federation.test) >= 200 and len(federation.labels) > 5
    as_classes = load_federation(
        from_dict({"seed": 3, "task": {"kind": "classification"}, "partition": {"kind": "dirichlet", "clients": 5}})
    )
    assert as_classes.labels == federation.labels
    assert max(as_classes.test["label"]) < len(federation.labels)

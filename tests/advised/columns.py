"""The advice about columns, values, conversations and clients of a source: files that are mended, and settings that are changed."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fedtune.config import from_dict
from fedtune.data import load_federation, load_test
from fedtune.data.values import names_of
from tests.advised.data import CLS, LM, ROWS, data, deal, error_of, refusal_of, rows
from tests.advised.rows import Place, follows
from tests.data.test_bad_input import ASK

CHAT: dict[str, Any] = {"task": {"kind": "chat"}, "partition": {"kind": "iid", "clients": 1}}
TURNS = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]


def lines(*values: dict[str, Any]) -> str:
    """These rows, six times each."""
    return "".join(json.dumps(value) + "\n" for value in values * 6)


def talk(*messages: Any, **more: Any) -> str:
    return lines({"messages": list(messages), **more})


TEXT = {"text": "a", "label": "x"}, {"text": "b", "label": "y"}
GOOD = talk(*TURNS)

# -- columns ------------------------------------------------------------------------------------------------------------------------------

rows("needs 'messages', but the {} rows have only {}: set data.columns.messages, or the templates data.prompt and data.answer", "a.jsonl",
     lines({"dialog": TURNS, "q": "why?", "a": "so"}), CHAT, data(CHAT, columns={"messages": "dialog"}),
     data(CHAT, prompt="{q}", answer="{a}"))  # fmt: skip
SPOKEN = lines(*({**row, "speaker": "ann"} for row in TEXT))
rows("set data.columns.client or data.client_from_file=true, or take partition.kind=iid", "a.jsonl", SPOKEN, deal(CLS, kind="natural"),
     data(deal(CLS, kind="natural"), columns={"client": "speaker"}), data(deal(CLS, kind="natural"), client_from_file=True),
     deal(CLS, kind="iid", clients=1))  # fmt: skip
TOPICS = lines({"text": "a", "topic": "x"}, {"text": "b", "topic": "y"})
rows("splits rows by label, but these rows have none: set data.columns.label or take iid", "a.jsonl", TOPICS,
     deal(LM, kind="dirichlet", clients=2), data(deal(LM, kind="dirichlet", clients=2), columns={"label": "topic"}),
     deal(LM, kind="iid", clients=2))  # fmt: skip
rows("data.columns.messages is a template: name the column with the conversations", "a.jsonl", lines({"dialog": TURNS}),
     data(CHAT, columns={"messages": "{dialog}"}), data(CHAT, columns={"messages": "dialog"}))  # fmt: skip
rows("(data.columns.messages), only {}: correct the name", "a.jsonl", lines({"dialog": TURNS}), data(CHAT, columns={"messages": "talk"}),
     data(CHAT, columns={"messages": "dialog"}))  # fmt: skip
rows("(data.columns.{}), only {}: correct the name", "a.jsonl", ROWS, data(CLS, columns={"label": "lable"}),
     data(CLS, columns={"label": "label"}))  # fmt: skip
rows("data.columns.{} is not known: choose from {}", "a.jsonl", TOPICS, data(CLS, columns={"lable": "topic"}),
     data(CLS, columns={"label": "topic"}))  # fmt: skip
rows("needs '{}', but the {} rows have only {}: set data.columns.{}{}", "a.jsonl", TOPICS, CLS, data(CLS, columns={"label": "topic"}))
rows("every {} row has an empty {}: see data.columns", "a.jsonl", lines({"text": " ", "body": "a"}), LM, data(LM, columns={"text": "body"}))
rows("the {} template {} names '{}', but the rows have only {}: correct the name", "a.jsonl", ROWS,
     data(ASK, prompt="{txet}", answer="{label}"), data(ASK, prompt="{text}", answer="{label}"))  # fmt: skip

# -- values -------------------------------------------------------------------------------------------------------------------------------

rows("{} row {} has no '{}': fill it or remove the row", "a.jsonl", ROWS + '{"text": "c", "label": null}', CLS,
     ROWS + '{"text": "c", "label": "x"}', ROWS)  # fmt: skip
rows("{} {} is malformed ({}): write a literal brace twice", "a.jsonl", ROWS, data(ASK, prompt="{ {text}", answer="{label}"),
     data(ASK, prompt="{{ {text}", answer="{label}"))  # fmt: skip
rows("{} {} needs '{}', but row {} has none: fill it or remove the row", "a.jsonl", ROWS + '{"text": null, "label": "y"}',
     data(ASK, prompt="{text}", answer="{label}"), ROWS + '{"text": "c", "label": "y"}', ROWS)  # fmt: skip


def _numbers(*values: float) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [float(value) for value in values]}), sink)
    return sink.getvalue().to_pybytes()


rows("row {} of column '{}' is {}, but '{}' must be text: fill it or remove the row", "a.parquet", _numbers(1, 2, float("nan"), 3), LM,
     _numbers(1, 2, 4, 3), _numbers(1, 2, 3))  # fmt: skip
rows("has the label {}, but a label is a name or a whole number: see data.columns.label", "a.jsonl",
     lines({"text": "a", "label": 0.5, "topic": "x"}, {"text": "b", "label": 1.5, "topic": "y"}), CLS,
     data(CLS, columns={"label": "topic"}))  # fmt: skip
rows("has an empty label: fill it or remove the row; see data.columns.label", "a.jsonl", ROWS + '{"text": "c", "label": " "}', CLS,
     ROWS + '{"text": "c", "label": "x"}', ROWS)  # fmt: skip
rows("{} row {} has the label '{}', but the classes are {}: correct it or remove the row", "a.jsonl", ROWS + '{"text": "c", "label": "z"}',
     data(CLS, labels=["x", "y"]), ROWS + '{"text": "c", "label": "y"}', ROWS)  # fmt: skip
rows("take templates with a part that is text, such as 'data.prompt=\"{}\"' 'data.answer=\"{}\"'", "a.jsonl",
     lines({"instruction": "why?", "input": ["today"], "output": "so"}), CHAT,
     data(CHAT, prompt="{instruction} {input[0]}", answer="{output}"))  # fmt: skip


@follows("{} row {} has class id {}, but there are {} classes: remove the row")
def _(place: Place) -> Iterator[str]:
    for ids in ([0, 1, 2], [0, 1]):
        yield error_of(lambda ids=ids: names_of(ids, ("x", "y"), "training"))


# -- conversations ------------------------------------------------------------------------------------------------------------------------

BARE = talk({"role": "user", "content": "why?"}, {"role": "assistant"})
rows("message {} has a content that is not text; remove images and other parts, or the row", "a.jsonl",
     GOOD + talk({"role": "user", "content": [{"type": "text", "text": "why?"}, {"type": "image"}]}, TURNS[1]), CHAT,
     GOOD + talk({"role": "user", "content": [{"type": "text", "text": "why?"}]}, TURNS[1]), GOOD)  # fmt: skip
rows("it is {}; write a list of messages", "a.jsonl", lines({"messages": "{}"}), CHAT, GOOD)
rows("{} is not JSON; write a list of messages", "a.jsonl", lines({"messages": "why?"}), CHAT, GOOD)
rows("no message has the role 'assistant', so there is nothing to learn; remove the row", "a.jsonl", GOOD + talk(TURNS[0]), CHAT, GOOD)
rows("message {} is {}; write an object with role and content", "a.jsonl", talk("why?", TURNS[1]), CHAT, GOOD)
rows("message {} has the role {}; choose system, user, assistant or tool", "a.jsonl", talk({"role": "boss", "content": "a"}, *TURNS), CHAT,
     *(talk({"role": role, "content": "a"}, *TURNS) for role in ("system", "user", "assistant", "tool")))  # fmt: skip
rows("message {} has no content; fill it or remove the row", "a.jsonl", GOOD + BARE, CHAT, GOOD + talk(*TURNS), GOOD)
rows("has tools that are no list of JSON schemas ({}): correct them, or rename the column", "a.jsonl", talk(*TURNS, tools="hammer"), CHAT,
     talk(*TURNS, tools=[{"name": "hammer"}]), talk(*TURNS, means="hammer"))  # fmt: skip

# -- encodings ----------------------------------------------------------------------------------------------------------------------------

LATIN = ROWS.encode() + '{"text": "café", "label": "x"}\n'.encode("cp1252")
rows("set data.encoding to the file's encoding, such as data.encoding={}", "a.jsonl", LATIN, CLS, data(CLS, encoding="cp1252"))
rows("data.encoding={} is not known: give auto, or a name such as utf-8, latin-1 or cp1252", "a.jsonl", ROWS,
     data(CLS, encoding="klingon"), *(data(CLS, encoding=name) for name in ("auto", "utf-8", "latin-1", "cp1252")))  # fmt: skip


@follows("%s is not UTF-8 and is read as Windows-1252%s: if that is wrong, set data.encoding")
def _(place: Place) -> Iterator[str]:
    noted: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            noted.append(str(record.msg))  # with its %s, because the table has the sentences of the source

    logger, notes = logging.getLogger("fedtune.data"), Notes()
    logger.addHandler(notes)
    try:
        table = b"text,label\n" + "café,x\nthé,y\n".encode("latin-1") * 6
        for settings in (CLS, data(CLS, encoding="latin-1")):
            noted.clear()
            yield refusal_of(place, settings, {"a.csv": table}, "a.csv") or " ".join(noted)
    finally:
        logger.removeHandler(notes)


# -- clients, tests and sources -----------------------------------------------------------------------------------------------------------

NATURAL = deal(CLS, kind="natural")


def _class_rows(*classes: str) -> str:
    return lines(*({**TEXT[i % 2], "client": "ann", "device_class": name} for i, name in enumerate(classes)))


rows("client '{}' has no rows in this scenario, whose clients are {}: take one of these ids, or own rows", "a.jsonl",
     lines(*({**row, "client": "ann"} for row in TEXT)), data(NATURAL, client="bob"), data(NATURAL, client="ann"),
     lines(*({**row, "client": "bob"} for row in TEXT)))  # fmt: skip
rows("{} training row is too few for data.test_fraction={}: set it to 0", "a.jsonl", '{"text": "a b"}\n', data(LM, test_fraction=0.5),
     data(LM, test_fraction=0.0))  # fmt: skip
PHONES: dict[str, Any] = {"devices": {"classes": {"phone": {}}}}
BOTH: dict[str, Any] = {"devices": {"classes": {"phone": {}, "laptop": {}}}}
rows("client '{}' has rows of device_class '{}' and '{}': give all its rows one class", "a.jsonl", _class_rows("phone", "laptop"),
     NATURAL | BOTH, _class_rows("phone", "phone"))  # fmt: skip
rows("client '{}' has device_class '{}', but devices.classes has only {}: add it", "a.jsonl", _class_rows("laptop", "laptop"),
     NATURAL | PHONES, NATURAL | BOTH)  # fmt: skip


@follows("name the classes: set data.labels to the names in the order of their ids, or set data.test_path")
def _(place: Place) -> Iterator[str]:
    (place.folder / "test.jsonl").write_text(ROWS)
    for more in ({}, {"labels": ["x", "y"]}, {"test_path": str(place.folder / "test.jsonl")}):
        yield error_of(lambda more=more: load_test(from_dict(CLS | {"data": {"source": "local", **more}})))


def _hub(place: Place, settings: dict[str, Any], **values: Any) -> str:
    found = {"source": "hub", "name": str(place.folder / "set"), "test_fraction": 0.0, **values}
    return error_of(lambda: load_federation(from_dict(settings | {"data": found})))


@follows("data.name={} has no split '{}': choose from {}")
def _(place: Place) -> Iterator[str]:
    datasets.DatasetDict({"all": datasets.Dataset.from_list([*TEXT] * 6)}).save_to_disk(place.folder / "set")
    yield _hub(place, CLS)
    yield _hub(place, CLS, split="all")


@follows("data.name={} is a single split, without data.test_split={}: set it to null")
def _(place: Place) -> Iterator[str]:
    datasets.Dataset.from_list([*TEXT] * 6).save_to_disk(place.folder / "set")
    for split in ("test", None):
        yield _hub(place, CLS, test_split=split)


@follows("cannot load {}: {}: {}; check the name, the subset, the split and the network, or use data=local")
def _(place: Place) -> Iterator[str]:
    (place.folder / "set").mkdir()
    (place.folder / "set" / "train.jsonl").write_text(ROWS)
    yield _hub(place, CLS, split="tarin")
    yield _hub(place, CLS, split="train")
    yield refusal_of(place, CLS, {"a.jsonl": ROWS}, "a.jsonl")


@follows("{} is a {} instead of one split of rows: check data.split")
def _(place: Place) -> Iterator[str]:
    one = datasets.Dataset.from_list([*TEXT] * 6)
    with place.patch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, split: one if split == "train" else datasets.DatasetDict({"train": one}))
        for split in ("", "train"):
            yield _hub(place, CLS, split=split)

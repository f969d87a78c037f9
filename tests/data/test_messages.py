"""Conversations: every form of a source becomes the same messages, and a faulty row is named."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedtune.config import Config, DataConfig, PartitionConfig, TaskConfig
from fedtune.config.compose import compose
from fedtune.contracts.rows import RowSet
from fedtune.data import load_federation
from fedtune.data.check import check_data
from fedtune.data.columns import canonical, check_names
from fedtune.data.hub import _rows
from fedtune.data.sources import read_source
from fedtune.errors import ConfigError, DataError, FedtuneError

WANTED = [{"role": "user", "content": "Capital of Peru?"}, {"role": "assistant", "content": "Lima."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def config(**data: Any) -> Config:
    return Config(task=TaskConfig(kind="chat"), data=DataConfig(source="local", **data), partition=PartitionConfig(kind="iid", clients=1))


def messages(rows: list[dict[str, Any]], **data: Any) -> list[Any]:
    table = canonical(_rows(Dataset.from_list(rows)), config(**data), "training")
    assert list(table.columns) == ["messages", "row"]
    return [json.loads(text) for text in table.columns["messages"]]


SHAREGPT = [{"from": "human", "value": "Capital of Peru?"}, {"from": "gpt", "value": "Lima."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Capital "}, {"type": "text", "text": "of Peru?"}]}, WANTED[1]]


@pytest.mark.parametrize(
    ("row", "data"),
    [
        ({"messages": WANTED}, {}),
        ({"messages": PARTS[:1] + [{"role": "assistant", "content": [{"type": "text", "text": "Lima."}]}]}, {}),
        ({"messages": json.dumps(PARTS)}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"dialog": WANTED, "messages": "of the source"}, {"columns": {"messages": "dialog"}}),
        ({"prompt": "Capital of Peru?", "answer": "Lima."}, {}),
        ({"question": "Peru", "reply": "Lima."}, {"prompt": "Capital of {question}?", "answer": "{reply}"}),
        ({"q": "Capital of Peru?", "a": "Lima."}, {"columns": {"prompt": "q", "answer": "a"}}),
        ({"instruction": "Capital of Peru?", "output": "Lima."}, {}),
        ({"instruction": "Capital of Peru?", "input": " ", "output": "Lima."}, {}),
        ({"instruction": "Capital of Peru?", "input": None, "output": "Lima."}, {}),
    ],
)
def test_every_form_is_the_same_conversation(row: dict[str, Any], data: dict[str, Any]) -> None:
    assert messages([row], **data) == [WANTED]


def test_alpaca_adds_its_input_and_system() -> None:
    row = {"instruction": "Name its capital.", "input": "Peru", "output": "Lima.", "system": "Be brief."}
    assert messages([row]) == [[SYSTEM, {"role": "user", "content": "Name its capital.\n\nPeru"}, WANTED[1]]]


@pytest.mark.parametrize(
    ("column", "contents"),
    [("input", ["Name its capital. Peru", "Lima."]), ("system", ["Peru Name its capital.", "Lima."]), ("instruction", ["Peru", "Lima."]),
     ("output", ["Name its capital.", "Peru"])],
)  # fmt: skip
def test_alpaca_columns_are_text_and_the_advice_for_a_list_works(column: str, contents: list[str], tmp_path: Path) -> None:
    row = {"instruction": "Name its capital.", "output": "Lima."}
    assert messages([{**row, column: 5}]) == messages([{**row, column: "5"}])
    settings = [f"data.path={write(tmp_path / 'a.jsonl', [{**row, column: ['Peru']}])}", "data=local", "task=chat", "partition=iid"]

    def read(*more: str) -> list[Any]:
        (job,) = compose(["conf=base", *settings, *more])
        return json.loads(canonical(read_source(job.config)[1], job.config, "training").columns["messages"][0])

    with pytest.raises(DataError, match=f"column '{column}' has list values, but '{column}' must be text") as refused:
        read()
    advice = shlex.split(str(refused.value).partition("such as ")[2])
    assert [message["content"] for message in read(*advice)] == contents and len(advice) == 2


SCHEMA = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "text"])
def test_tools_reach_the_rows_in_every_form(tmp_path: Path, suffix: str) -> None:
    other = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    rows: list[dict[str, Any]] = [{"messages": WANTED, "tools": tools} for tools in ([SCHEMA, other], [], None)]
    if suffix == "text":
        rows = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    path = tmp_path / f"a.{suffix.replace('text', 'jsonl')}"
    Dataset.from_list(rows).to_parquet(path) if suffix == "parquet" else write(path, rows)
    settings = config(path=str(path), test_fraction=0.0, held_out=0.0)
    check_data(settings)
    found = load_federation(settings).rows["tools"][:]
    assert [json.loads(text) if text else None for text in found] == [[SCHEMA, other], None, None]


@pytest.mark.parametrize("value", ["search", ["search"], "{", {"name": "capital"}])
def test_tools_without_schemas_are_reported(value: Any) -> None:
    with pytest.raises(DataError, match=r"^training row 1 has tools that are no list of JSON schemas \(.*\): correct them, or rename"):
        canonical(RowSet({"messages": [json.dumps(WANTED)], "tools": [value]}), config(), "training")


def test_an_unrelated_tools_column_is_ignored() -> None:
    row = {"prompt": "Capital of Peru?", "answer": "Lima.", "tools": "hammer"}
    assert messages([row]) == [WANTED]


def test_half_a_surrogate_pair_is_reported() -> None:
    good = json.dumps(WANTED)
    with pytest.raises(DataError, match=r"training row 2 has '\\ud83d', which is not a character: clean the file"):
        messages([{"messages": good}, {"messages": good.replace("Lima.", "\\ud83d")}])


def test_explicitly_named_columns_are_used() -> None:
    row = {"messages": WANTED, "q": "Other?", "a": "Yes."}
    assert messages([row], columns={"prompt": "q", "answer": "a"})[0][0]["content"] == "Other?"


def test_roles_are_mapped_and_tool_keys_are_kept() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Lima"}}}
    chat = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "fog", "name": "weather", "tool_call_id": "1"},
        {"role": "assistant", "content": "Fog.", "reasoning_content": "It says fog."},
    ]
    assert messages([{"messages": json.dumps(chat)}]) == [
        [
            SYSTEM,
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "fog", "name": "weather", "tool_call_id": "1"},
            {"role": "assistant", "content": "Fog.", "reasoning_content": "It says fog."},
        ]
    ]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no JSON", "'no JSON' is not JSON; write a list of messages"),
        ("[]", "it is empty; write a list of messages"),
        ('[{"role": "user", "content": null, "tool_calls": []}]', "message 1 has no content; fill it or remove the row"),
        ("null", "it is empty; write a list of messages"),
        ('{"role": "user"}', "it is dict; write a list of messages"),
        ('["hello"]', "message 1 is str; write an object with role and content"),
        ('[{"role": "critic", "content": "a"}]', "message 1 has the role 'critic'; choose system, user, assistant or tool"),
        ('[{"content": "a"}]', "message 1 has the role None; choose system, user, assistant or tool"),
        ('[{"role": "user"}]', "message 1 has no content; fill it or remove the row"),
        ('[{"role": "user", "content": 3}]', "message 1 has a content that is not text; remove images and other parts, or the row"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "message 1 has a content that is not text; remove images"),
        ('[{"role": "user", "content": "a"}]', "no message has the role 'assistant', so there is nothing to learn; remove the row"),
    ],
)
def test_a_faulty_row_is_named(value: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        messages([{"messages": json.dumps(WANTED)}, {"messages": value}])
    assert str(caught.value).startswith(f"training row 2 is not a conversation: {reason}")


@pytest.mark.parametrize(
    ("present", "data", "sentence"),
    [
        (["text"], {}, "kind=chat needs 'messages', but the training rows have only text: set data.columns.messages, or the templates"),
        (["messages"], {"columns": {"messages": "chat"}}, r"no column 'chat' \(data.columns.messages\), only messages: correct the name"),
        (["chat"], {"columns": {"messages": "{chat}"}}, "data.columns.messages is a template: name the column with the conversations"),
        (["instruction"], {}, "task.kind=chat needs 'messages', but the training rows have only instruction"),
    ],
)
def test_a_source_without_conversations_is_refused(present: list[str], data: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ConfigError, DataError), match=sentence):
        check_names(present, config(**data), "training")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_local_rows_may_mix_texts_and_parts(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [{"messages": WANTED}, {"messages": PARTS}, {"messages": [SYSTEM, *WANTED]}])
    asked = config(path=str(file), test_fraction=0.0, held_out=0.0)
    check_data(asked)
    rows = load_federation(asked).rows
    assert [json.loads(text) for text in rows["messages"][:]] == [WANTED, WANTED, [SYSTEM, *WANTED]]


def test_inputs_of_several_types_are_not_lost(tmp_path: Path) -> None:
    rows = [{"instruction": "Name it.", "input": value, "output": "Lima."} for value in ("Peru", 3)]
    with pytest.raises(DataError, match=r"column 'input' has values of several types .*: give all its values one type"):
        load_federation(config(path=str(write(tmp_path / "rows.jsonl", rows))))


@pytest.mark.parametrize("rows", [[{"text": "a"}], [{"messages": [{"role": "user", "content": "a"}]}]])
def test_a_file_without_answers_is_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(FedtuneError, match=r"needs 'messages'|training row 1 is not a conversation"):
        load_federation(config(path=str(file)))


def test_the_demo_is_a_conversation() -> None:
    config, train, _ = read_source(Config(task=TaskConfig(kind="chat")))
    (user, assistant), *_ = [json.loads(text) for text in canonical(train.select([0]), config, "training").columns["messages"]]
    assert (user, assistant) == (
        {"role": "user", "content": train[0]["request"]},
        {"role": "assistant", "content": train[0]["action"]},
    )

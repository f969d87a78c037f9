"""A device's own rows need the columns of the task, and no other columns of the scenario."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.clients.deployed import Device, own_config
from fedtune.config.compose import compose
from fedtune.contracts.task import find
from fedtune.data import Federation, check_data, load_federation
from fedtune.errors import DataError

REQUEST: dict[str, Any] = {"request": "turn on the lamp", "action": "light lounge on"}
FEW = ["data.test_fraction=0", "partition=dirichlet"]
LOCAL = ["conf=base", "data=local", "data.columns.client=speaker", "data.columns.label=topic", "data.columns.device_class=kind", *FEW]


def load(folder: Path, settings: list[str], row: dict[str, Any], labels: list[str] | None = None) -> Federation:
    """Load the own rows of a client, from a file with such rows, in an experiment with these settings."""
    (folder / "own.jsonl").write_text(f"{json.dumps(row)}\n" * 5)
    (job,) = compose(settings)
    config = own_config(job.config, Device(client="anna", state=folder, data=str(folder / "own.jsonl")), labels or [])
    check_data(config)
    return load_federation(config)


@pytest.mark.parametrize("more", [{}, {"intent": None}, {"intent": [1, {}]}, {"client": "", "device_class": 3.5, "label": None}], ids=str)
def test_own_rows_for_the_default_scenario_are_requests_and_actions(tmp_path: Path, more: dict[str, Any]) -> None:
    held = load(tmp_path, ["conf=heterogeneous"], REQUEST | more)
    assert list(held.clients) == ["anna"] and len(held.clients["anna"].train) == 4
    assert held.rows[0]["prompt"] == "Request: turn on the lamp\nAction:" and held.rows[0]["answer"] == " light lounge on"


def test_own_requests_are_conversations_in_the_assistant_scenario(tmp_path: Path) -> None:
    (text,) = {*load(tmp_path, ["conf=assistant"], REQUEST).rows["messages"][:]}
    assert [message["content"] for message in json.loads(text)] == [REQUEST["request"], REQUEST["action"]]


def test_a_column_of_the_task_is_required(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the training rows have no column 'intent' \(data\.columns\.label\), only request, action"):
        load(tmp_path, ["conf=heterogeneous", "task=classification"], REQUEST, ["off", "on"])
    held = load(tmp_path, ["conf=heterogeneous", "task=classification"], {"request": "on", "intent": "on"}, ["off", "on"])
    assert held.rows["label"][:] == [1] * 5


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("causal_lm", {"text": "a b"}),
        ("instruction", {"prompt": "a", "answer": "b"}),
        ("classification", {"text": "a", "topic": "x"}),
        ("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("chat", {"instruction": "a", "output": "b"}),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("regression", {"text": "a", "target": 1.5}),
        ("multi_label", {"text": "a", "labels": ["x"]}),
    ],
)
def test_partition_columns_are_not_required_of_own_rows(tmp_path: Path, task: str, row: dict[str, Any]) -> None:
    settings = LOCAL if task != "multi_label" else LOCAL[:-1]  # it has no label to split by
    held = load(tmp_path, [*settings, f"task={task}", "data.path=elsewhere"], row, ["x", "y"] if find(task).classes else None)
    assert len(held.clients["anna"].train) == 4


def test_a_column_that_the_demo_does_not_have_is_refused_before_any_library() -> None:
    (job,) = compose(["conf=heterogeneous", "data.columns.label=genre"])
    with pytest.raises(DataError, match="the training rows have no column 'genre'") as early:
        check_data(job.config)
    with pytest.raises(DataError) as late:
        load_federation(job.config)
    assert str(early.value) == str(late.value)

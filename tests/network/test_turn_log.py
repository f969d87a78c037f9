"""A client's log lines about its turns and refusals."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedtune.cli import client as program
from fedtune.clients.declining import decline_reply
from fedtune.contracts import flower
from fedtune.errors import DataError, Decline
from fedtune.network.logs import logging_to
from fedtune.network.turn_log import describe

NODE = 4611686018427387904


@pytest.fixture(autouse=True)
def identity() -> None:
    flower.identify_process(1)


def request_message(kind: str, round: int = 3, numbers: int = 100_000, **records: Any) -> Message:
    content: dict[str, Any] = {n: ConfigRecord({"json": json.dumps(v)}) for n, v in records.items()}
    if numbers:
        content["adapter"] = ArrayRecord({"w": Array(np.zeros(numbers, np.float32))})
    message = Message(RecordDict(content), NODE, kind, group_id=str(round))
    flower.stamp(message)
    return message


def reply_message(message: Message, numbers: int = 50_000, **records: Any) -> Message:
    content: dict[str, Any] = {n: ConfigRecord({"json": json.dumps(v)}) for n, v in records.items()}
    if numbers:
        content["adapter"] = ArrayRecord({"w": Array(np.zeros(numbers, np.float32))})
    return Message(RecordDict(content), reply_to=message)


def turn(metrics: dict[str, float], steps: int) -> tuple[str, dict[str, Any]]:
    message = request_message("train")
    return describe(message, reply_message(message, update={"metrics": metrics, "measurements": {"steps": steps}}), 4.123)


def test_a_turn_logs_its_round_steps_seconds_loss_and_bytes() -> None:
    # 100,000 and 50,000 numbers of 4 bytes, which Flower puts into an .npy of 128 bytes more
    sentence, fields = turn({"train_loss": 0.41234, "start_loss": 2.0}, 16)
    assert sentence == "round 3: trained 16 steps in 4.1 s, loss 0.4123; 0.40 MB down, 0.20 MB up"
    assert fields == {"round": 3, "seconds": 4.123, "steps": 16, "loss": 0.41234, "bytes_down": 400_128, "bytes_up": 200_128}


def test_turns_with_and_without_steps_log_their_line() -> None:
    assert turn({}, 16)[0] == "round 3: trained 16 steps in 4.1 s; 0.40 MB down, 0.20 MB up"
    assert turn({}, 0)[0].startswith("round 3: scored its rows without training in 4.1 s;")


def test_an_evaluation_logs_its_scores() -> None:
    message = request_message("evaluate")
    sentence, fields = describe(message, reply_message(message, 0, metrics={"loss": 1.25, "exact_match": 0.5}), 0.26)
    assert sentence == "round 3: evaluated in 0.3 s: exact_match 0.5, loss 1.25; 0.40 MB down, 0.00 MB up"
    assert fields["exact_match"] == 0.5


@pytest.mark.parametrize(
    ("kind", "bad", "sentence"),
    [
        ("train", Decline("privacy", "the budget is spent"), "round 3: did not train (privacy): the budget is spent"),
        ("train", Decline("deadline", "it would take 50 s"), "round 3: did not train (deadline): it would take 50 s"),
        ("evaluate", DataError("no held-out row"), "round 3: did not evaluate (failed): no held-out row"),
        ("query", DataError("rows.csv: no column 'text'"), "cannot take part (failed): rows.csv: no column 'text'"),
        ("train", RuntimeError("x"), "round 3: did not train (failed): RuntimeError: x"),
    ],
)
def test_the_clients_own_refusal_is_logged(kind: str, bad: Exception, sentence: str) -> None:
    message = request_message(kind)
    line, fields = describe(message, decline_reply(message, bad), 0.1)
    assert line == sentence and fields["why"] in sentence


def test_a_hello_logs_the_run_the_name_and_the_device() -> None:
    message = request_message("query", hello={"run": "trial\x1b[2J"}, numbers=0)
    reply = reply_message(message, 0, hello={"client": "anna", "examples": 12, "held_out": 3, "device": "1 core: fp32"})
    sentence, _ = describe(message, reply, 0.1)
    assert sentence == "takes part in run trial [2J as client anna, with 12 training rows and 3 held-out rows; this device: 1 core: fp32"


def test_an_error_and_an_unknown_group_are_logged_without_node_ids() -> None:
    message = Message(RecordDict({}), NODE, "train", group_id="\x1b[2J")
    flower.stamp(message)
    assert describe(message, Message(Error(1, "two children died"), reply_to=message), 0.1)[0] == "could not answer: two children died"
    assert describe(message, reply_message(message, 0), 0.1)[0].startswith("scored its rows")


def test_the_command_writes_the_line_to_the_terminal_and_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = request_message("train")
    reply = reply_message(message, update={"metrics": {"train_loss": 0.5}, "measurements": {"steps": 2}})

    def answer() -> Message:
        time.sleep(0.06)
        return reply

    with logging_to(tmp_path / "client.jsonl"):
        assert program._recorded(message, answer) is reply
    assert capsys.readouterr().err == "fedtune-client: round 3: trained 2 steps in 0.1 s, loss 0.5; 0.40 MB down, 0.20 MB up\n"
    (line,) = (tmp_path / "client.jsonl").read_text().splitlines()
    document = json.loads(line)
    assert (document["round"], document["steps"], document["loss"], document["bytes_up"]) == (3, 2, 0.5, 200_128) and document[
        "seconds"
    ] >= 0.06
    assert str(NODE) not in line

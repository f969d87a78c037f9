"""A client that restarts at once gets no second hello: it continues with the stored one."""

import json
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.clients.deployed import HELLO, make_app
from fedtune.clients.workspace import Workspace
from fedtune.config import to_dict
from fedtune.contracts import flower
from fedtune.contracts.wire import MessageWriter
from tests.tiny import tiny_config


def ask(app: ClientApp, kind: str, content: RecordDict) -> RecordDict:
    flower.identify_process(1)
    where: dict[str, Any] = {"partition-id": 0, "num-partitions": 1}
    context = Context(run_id=1, node_id=7, node_config=where, state=RecordDict(), run_config={})
    return app(Message(content, 7, kind), context).content


def why(content: RecordDict) -> str:
    return str(content.config_records["declined"]["why"]) if "declined" in content.config_records else ""


def test_a_restarted_client_continues_with_its_stored_hello(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    settings = {
        "client": "anna",
        "state": str(tmp_path / "state"),
        "data": str(tmp_path / "rows.jsonl"),
        "model": str(tmp_path / "model"),
        "device": None,
    }
    (tmp_path / "state").mkdir()
    evaluation = MessageWriter(0, ()).write(Workspace(config).initial, held=())
    hello = RecordDict({"hello": ConfigRecord({"json": json.dumps({"config": to_dict(config), "run": "r", "labels": []})})})

    assert "the server must send its hello before other messages" in why(ask(make_app(settings), "evaluate", evaluation))
    first = make_app(settings)
    assert why(ask(first, "query", hello)) == ""
    before = ask(first, "evaluate", evaluation)
    assert why(before) == ""
    after = ask(make_app(settings), "evaluate", evaluation)  # for the app this is another process
    assert after.config_records["metrics"] == before.config_records["metrics"]


def test_a_refused_hello_is_not_stored(tmp_path: Path) -> None:
    app = make_app({"client": "anna", "state": str(tmp_path), "data": None, "device": None})
    assert "the hello lacks the field 'config'" in why(ask(app, "query", RecordDict({"hello": ConfigRecord({"json": "{}"})})))
    assert "the server's hello is empty" in why(ask(app, "query", RecordDict({})))
    assert not (tmp_path / HELLO).exists()


def test_an_unwritable_folder_gives_a_one_sentence_error(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    app = make_app(
        {
            "client": "anna",
            "state": str(tmp_path / "gone"),
            "data": str(tmp_path / "rows.jsonl"),
            "model": str(tmp_path / "model"),
            "device": None,
        }
    )
    hello = RecordDict({"hello": ConfigRecord({"json": json.dumps({"config": to_dict(config), "run": "r", "labels": []})})})
    message = why(ask(app, "query", hello))
    assert message.startswith(f"cannot write to {tmp_path / 'gone'}: No such file or directory; free the disk")

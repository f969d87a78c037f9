"""The privacy minimum of a device's command line holds against a lying server."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.cli import client
from fedtune.clients.deployed import Device, make_app, read_hello
from fedtune.clients.workspace import Workspace
from fedtune.config import Config, PrivacyConfig, to_dict
from fedtune.contracts import flower
from fedtune.contracts.wire import MessageWriter
from fedtune.errors import CheckpointError, Decline
from fedtune.privacy.accounting import Spend, epsilon
from fedtune.privacy.floor import Floor
from fedtune.privacy.ledger import Ledger, ledger_file
from fedtune.privacy.turn import TurnPrivacy
from fedtune.rounds.planning import base_plan
from tests.tiny import tiny_config

RECORD = PrivacyConfig(kind="record", epsilon=None, noise=0.8, clip=0.5, accountant="rdp")


class LyingServer:
    """A server whose plan differs from its hello, with any run name."""

    def __init__(self, folder: Path, **floor: Any) -> None:
        self.config = tiny_config(folder)
        self.initial = Workspace(self.config).initial
        own = {"data": str(folder / "rows.jsonl"), "model": str(folder / "model"), "device": None}
        (folder / "state").mkdir()
        self.app: ClientApp = make_app({"client": "anna", "state": str(folder / "state"), **own, **floor})

    def hello(self, privacy: PrivacyConfig, run: str = "r") -> str:
        body = {"config": to_dict(dataclasses.replace(self.config, privacy=privacy)), "run": run, "labels": []}
        return self._ask("query", RecordDict({"hello": ConfigRecord({"json": json.dumps(body)})}))

    def train(self, asked: PrivacyConfig, **changes: Any) -> str:
        plan = dataclasses.replace(base_plan(dataclasses.replace(self.config, privacy=asked), 1, "anna", 0), **changes)
        return self._ask("train", MessageWriter(0, ()).write(self.initial, held=(), plan=plan))

    def evaluate(self) -> str:
        return self._ask("evaluate", MessageWriter(0, ()).write(self.initial, held=()))

    def _ask(self, kind: str, content: RecordDict) -> str:
        """The reason for a refusal; "" without one."""
        flower.identify_process(1)
        where: dict[str, Any] = {"partition-id": 0, "num-partitions": 1}
        context = Context(run_id=1, node_id=7, node_config=where, state=RecordDict(), run_config={})
        reply = self.app(Message(content, 7, kind), context).content
        return str(reply.config_records["declined"]["why"]) if "declined" in reply.config_records else ""


def test_a_server_without_privacy_is_refused_in_hello_and_plan(tmp_path: Path) -> None:
    server, none = LyingServer(tmp_path, min_privacy="record"), PrivacyConfig()
    assert "at least privacy=record (--min-privacy), but the server asks for privacy=none" in server.hello(none)
    assert server.hello(RECORD) == ""
    assert "privacy=none" in server.train(none)  # a plan that differs from the hello
    assert server.train(RECORD) == ""
    assert "does not report exact scores of its rows" in server.evaluate()
    assert "asks for privacy=none" in server.hello(PrivacyConfig(kind="user"))  # noise that the server promises to add itself


def test_without_a_floor_the_server_decides(tmp_path: Path) -> None:
    server = LyingServer(tmp_path)
    assert server.hello(PrivacyConfig()) == server.train(PrivacyConfig()) == server.evaluate() == ""


@pytest.mark.slow
def test_the_budget_counts_every_run_and_any_noise(tmp_path: Path) -> None:
    server = LyingServer(tmp_path, min_privacy="record", max_epsilon=4.8)
    weak = dataclasses.replace(RECORD, noise=0.01)  # hello and plan agree, but this noise protects nothing
    assert server.hello(weak) == "" and "budget over all runs is ε = 4.8 at δ = 1e-05 (--max-epsilon)" in server.train(weak)
    huge = dataclasses.replace(RECORD, epsilon=1e6, noise=None)
    assert server.hello(huge) == "" and "(--max-epsilon)" in server.train(huge)
    answers = []
    for number in range(9):  # each turn has a new run name and therefore a new ledger
        assert server.hello(RECORD, f"run-{number}") == ""
        answers.append(server.train(RECORD))
        if answers[-1]:
            break
    assert len(answers) == 4 and "(--max-epsilon)" in answers[-1] and not any(answers[:-1])
    ledgers = sorted((tmp_path / "state").glob("run-*/privacy/anna.jsonl"))
    assert len(ledgers) == len(answers) - 1
    assert epsilon([cost for file in ledgers for cost in Ledger(file).spent()], 1e-5) <= 4.8


def test_the_noise_is_the_device_s_own(tmp_path: Path) -> None:
    hello_json = json.dumps({"config": to_dict(Config(privacy=RECORD)), "run": "r", "labels": []})
    device = Device(client="a", state=tmp_path, min_privacy="record")
    assert read_hello(hello_json, device)[0].privacy.secure_rng  # the server knows the run's seed and could subtract seeded noise
    assert not read_hello(hello_json, dataclasses.replace(device, min_privacy=None))[0].privacy.secure_rng


def test_a_floor_accepts_its_own_kind_and_stronger_ones(tmp_path: Path) -> None:
    def accepted_kinds(kind: str) -> list[str]:
        floor, results = Floor(kind=kind, epsilon=None, delta=1e-5, client="a", runs=tmp_path), []
        for privacy in ("none", "record", "user"):
            try:
                floor.check(privacy)
                results.append(privacy)
            except Decline:
                pass
        return results

    assert (accepted_kinds("record"), accepted_kinds("user")) == (["record", "user"], ["user"])


def test_an_unreadable_ledger_declines_the_turn(tmp_path: Path) -> None:
    floor = Floor(kind="record", epsilon=8.0, delta=1e-5, client="a", runs=tmp_path)
    turn = TurnPrivacy(clip=1.0, noise=2.0, cost=Spend(noise=2.0, rate=0.1, steps=3))
    (tmp_path / "hello.json").write_text("{}")  # not the folder of a run
    floor.check_budget(turn)
    file = ledger_file(tmp_path / "old" / "privacy", "a")
    file.parent.mkdir(parents=True)
    file.write_text("what?\n")
    with pytest.raises(CheckpointError, match="the spent budget is unknown"):
        floor.check_budget(turn)


def test_a_cost_for_single_rows_does_not_count_for_all_rows(tmp_path: Path) -> None:
    turn = TurnPrivacy(clip=1.0, noise=2.0, cost=Spend(noise=2.0, rate=1.0, steps=1))
    ledger, floors = Ledger(ledger_file(tmp_path / "first" / "privacy", "a")), {}
    for kind in ("user", "record"):
        floors[kind] = Floor(kind=kind, epsilon=50.0, delta=1e-5, client="a", runs=tmp_path)
    ledger.spend(1, turn.cost, "user")
    old = ledger.path.read_text().replace('"unit": "user", ', "")  # as written by earlier versions
    ledger.path.write_text(old + ledger.path.read_text())
    assert ledger.spent() == [turn.cost] * 2 and ledger.units() == {"", "user"}
    for floor in floors.values():
        floor.check_budget(turn)
    ledger.spend(2, turn.cost, "record")
    floors["record"].check_budget(turn)  # a cost for all rows covers each of them
    with pytest.raises(Decline, match="took part in the run first with privacy=record, .*: start it with --min-privacy record"):
        floors["user"].check_budget(turn)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max-epsilon", "8"], "add --min-privacy record or user"),
        (["--min-privacy", "record", "--max-epsilon", "nan"], "--max-epsilon nan is out of range"),
        (["--min-privacy", "record", "--delta", "1"], "--delta 1 is out of range"),
    ],
)
def test_the_command_line_is_checked(flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["--server", "localhost:1", "--insecure", "--state", str(tmp_path), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_line_reaches_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    class Executor:
        def __init__(self, settings: dict[str, Any], log: Path) -> None:
            seen.append(settings)
            raise KeyboardInterrupt

    monkeypatch.setattr("fedtune.network.executor.Executor", Executor)
    flags = ["--min-privacy", "user", "--max-epsilon", "4", "--delta", "1e-6"]
    assert client.main(["--server", "localhost:1", "--insecure", "--client-id", "a", "--state", str(tmp_path), *flags]) == 130
    device = Device(**{**seen[0], "state": tmp_path})
    assert (device.min_privacy, device.max_epsilon, device.delta) == ("user", 4.0, 1e-6)
    assert all(flag in client._parser().format_help() for flag in flags[::2])

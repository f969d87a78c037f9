"""The server delivers the model in parts to clients that lose messages, refuse, answer nonsense or were started again."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.clients.declining import decline_on_error
from fedtune.config import ClientConfig, Config, DeliverConfig, EvalConfig
from fedtune.contracts.delivery import DeliveryState, Manifest
from fedtune.contracts.strategy import ServerState
from fedtune.errors import ConfigError, Decline
from fedtune.rounds import delivery as module
from fedtune.rounds.delivery import Delivery
from tests.fakes import RecordingObserver, fail, fake_bridge, fake_client_app

CLIENTS = {"anna": 3, "bert": 4, "carla": 5}


class Devices:
    """Fake clients that store what is delivered. `faults[client]` is called with the number of its message, before the client answers."""

    def __init__(self, faults: dict[str, Callable[[int], Any]] | None = None, trains: bool = True) -> None:
        self.bodies = {c: bytearray() for c in CLIENTS}
        self.manifests: dict[str, Manifest] = {}
        self.delivered = list[tuple[str, int]]()
        self.ended = list[str]()
        self._faults, self._count = faults or {}, dict.fromkeys(CLIENTS, 0)
        self._training = {} if trains else dict.fromkeys(CLIENTS, fail("no update"))

    def app(self) -> ClientApp:
        app, ids = fake_client_app(CLIENTS, self._training), sorted(CLIENTS)

        @app.query("deliver")
        @decline_on_error
        def deliver(message: Message, context: Context) -> Message:
            client = ids[int(context.node_config["partition-id"])]
            self._count[client] += 1
            if client in self._faults and (answer := self._faults[client](self._count[client])) is not None:
                return Message(answer, reply_to=message)
            return Message(RecordDict({"delivery": self._take(client, message.content).to_record()}), reply_to=message)

        @app.query("end")
        def end(message: Message, context: Context) -> Message:
            self.ended.append(ids[int(context.node_config["partition-id"])])
            return Message(RecordDict(), reply_to=message)

        return app

    def _take(self, client: str, content: RecordDict) -> DeliveryState:
        manifest, body = Manifest.from_json(str(content.config_records["manifest"]["text"])), self.bodies[client]
        if client not in self.manifests or self.manifests[client].digest != manifest.digest:
            body.clear()
        self.manifests[client] = manifest
        if (part := content.config_records.get("part")) is not None and part["offset"] == len(body):
            body += part["data"]  # type: ignore[operator]
        if len(body) < manifest.bytes:
            return DeliveryState(state="wants", have=len(body))
        self.delivered.append((client, manifest.round))
        return DeliveryState(state="installed", chosen="global")


def run(
    folder: Path, devices: Devices, *, rounds: int = 2, offers: bool = True, delivers: Any = None
) -> tuple[ServerState, RecordingObserver]:
    settings = DeliverConfig(**{"timeout_s": 20.0, **(delivers or {})})
    config = Config(rounds=rounds, clients_per_round=3, deliver=settings)

    def make(observer: RecordingObserver) -> Delivery:
        return Delivery(folder=folder / "delivery", run="mine", config=settings, sign=None, offers=offers, note=observer.notes.append)

    bridge, observer = fake_bridge(folder, devices.app(), 3, config, delivery=make)
    state = bridge.loop()
    bridge.run.close()
    return state, observer


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 500)
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)


def results(folder: Path) -> dict[str, str]:
    return {c: r["result"] for c, r in json.loads((folder / "delivery/results.json").read_text()).items()}


def test_every_client_gets_the_last_state_and_learns_of_the_end(tmp_path: Path) -> None:
    devices = Devices()
    state, observer = run(tmp_path, devices)
    assert sorted(devices.delivered) == [(c, 2) for c in sorted(CLIENTS)]
    assert sorted(devices.ended) == sorted(CLIENTS)
    state.adapter.save(tmp_path / "wanted")
    assert {bytes(b) for b in devices.bodies.values()} == {(tmp_path / "wanted").read_bytes()}
    assert results(tmp_path) == dict.fromkeys(CLIENTS, "installed global")
    size = 3 * len(devices.bodies["anna"]) / 1e6
    (sentence,) = [n for n in observer.notes if n.startswith("delivered")]
    assert sentence.startswith("delivered the model of round 2 to 3 of 3 clients in ")
    assert sentence.endswith(f" s ({size:.2f} MB sent; 3 installed global)")


@pytest.mark.parametrize(
    ("settings", "offers", "delivered"),
    [
        ({"every": 2}, True, {2, 4, 5}),
        ({"every": 2, "at_end": False}, True, {2, 4}),
        ({"at_end": False}, True, set()),
        ({"every": 1}, False, set()),
    ],
)
def test_when_models_are_delivered(tmp_path: Path, settings: dict[str, Any], offers: bool, delivered: set[int]) -> None:
    devices = Devices()
    run(tmp_path, devices, rounds=5, offers=offers, delivers=settings)
    assert {round for _, round in devices.delivered} == delivered
    assert len(devices.delivered) == 3 * len(delivered)
    assert sorted(devices.ended) == sorted(CLIENTS)


def test_a_client_that_fails_a_few_times_continues_its_download(tmp_path: Path) -> None:
    def stumble(count: int) -> None:
        if count in (2, 3, 5):
            raise ConfigError("the disk is full")

    devices = Devices({"bert": stumble})
    run(tmp_path, devices)
    assert ("bert", 2) in devices.delivered
    assert results(tmp_path)["bert"] == "installed global"


def refuse(count: int) -> None:
    raise Decline("model", "its signature is wrong")


def break_down(count: int) -> None:
    raise ConfigError("the disk is full")


@pytest.mark.parametrize(
    ("fault", "result", "sentence"),
    [
        (refuse, "refused: its signature is wrong", "client bert has not installed the model: its signature is wrong"),
        (break_down, "failed: the disk is full", "client bert has not installed the model: the disk is full"),
        (lambda _: RecordDict(), "refused: its reply cannot be read: it lacks the record 'delivery'", "it lacks the record 'delivery'"),
        (
            lambda _: RecordDict({"delivery": ConfigRecord({"json": '{"state": "wants", "have": -5}'})}),
            "refused: its reply cannot be read: a number is negative",
            "a number is negative",
        ),
        (
            lambda _: RecordDict({"delivery": DeliveryState(state="wants", have=10**12).to_record()}),
            "failed: it asks for more bytes than the model has",
            "it asks for more bytes than the model has",
        ),
    ],
)
def test_a_client_that_does_not_install_is_named(tmp_path: Path, fault: Any, result: str, sentence: str) -> None:
    devices = Devices({"bert": fault})
    _, observer = run(tmp_path, devices)
    assert results(tmp_path) == {"anna": "installed global", "bert": result, "carla": "installed global"}
    assert any(sentence in note for note in observer.notes)
    assert any(note.startswith("delivered the model of round 2 to 2 of 3 clients") for note in observer.notes)


def test_a_run_without_a_good_update_delivers_nothing(tmp_path: Path) -> None:
    devices = Devices(trains=False)
    _, observer = run(tmp_path, devices, rounds=1)
    assert devices.delivered == []
    assert "round 1: there is no lora adapter to deliver yet" in observer.notes


def test_a_finished_run_that_is_started_again_delivers_again(tmp_path: Path) -> None:
    first = Devices()
    run(tmp_path, first)
    second = Devices()
    run(tmp_path, second)
    assert sorted(second.delivered) == sorted(first.delivered)
    assert second.manifests == first.manifests, "the same serial: the devices know that they have it"


def test_the_delivery_knows_what_the_clients_hold(tmp_path: Path) -> None:
    """A client merges all shifts when it compares the delivered model, so later messages need not repeat them."""
    from fedtune.strategies.flora import FLoRA

    devices = Devices()
    settings = DeliverConfig(every=1, timeout_s=20.0)
    config = Config(rounds=3, clients_per_round=3, deliver=settings, eval=EvalConfig(clients=0), client=ClientConfig(steps=3, lr=100.0))

    def make(observer: RecordingObserver) -> Delivery:
        return Delivery(folder=tmp_path / "delivery", run="mine", config=settings, sign=None, offers=True, note=observer.notes.append)

    bridge, _ = fake_bridge(tmp_path, devices.app(), 3, config, strategy=FLoRA(), delivery=make)
    state = bridge.loop()
    assert devices.manifests["anna"].base == tuple(s.spec.version for s in state.shifts)
    assert len(devices.bodies["anna"]) == devices.manifests["anna"].bytes


@pytest.mark.parametrize("offers", [True, False])
def test_a_finished_run_ends_without_clients_too(tmp_path: Path, offers: bool) -> None:
    run(tmp_path, Devices())
    config = Config(rounds=2, clients_per_round=3, min_clients=2)

    def make(observer: RecordingObserver) -> Delivery:
        settings = DeliverConfig(timeout_s=20.0)
        return Delivery(folder=tmp_path / "delivery", run="mine", config=settings, sign=None, offers=offers, note=observer.notes.append)

    app = fake_client_app(CLIENTS)
    bridge, observer = fake_bridge(tmp_path, app, 0, config, patience_s=0.2, expected_clients=3, delivery=make)
    assert bridge.loop().adapter.spec.version == 2
    waits = "waiting for clients, to deliver the model of round 2, for 0.2 s (--wait)"
    assert (waits in observer.notes) == offers
    assert any(note.startswith("delivered the model of round 2 to 0 of 0 clients") for note in observer.notes) == offers


def test_a_finished_run_delivers_to_the_clients_that_come(tmp_path: Path) -> None:
    """Two of three come: they do not wait for the third, and the server does, as long as it may."""
    run(tmp_path, Devices())
    devices, began = Devices(), time.monotonic()

    def make(observer: RecordingObserver) -> Delivery:
        settings = DeliverConfig(timeout_s=20.0)
        return Delivery(folder=tmp_path / "delivery", run="mine", config=settings, sign=None, offers=True, note=observer.notes.append)

    config = Config(rounds=2, clients_per_round=3, min_clients=3)
    bridge, _ = fake_bridge(tmp_path, devices.app(), 2, config, patience_s=1.0, expected_clients=3, delivery=make)
    bridge.loop()
    assert sorted(client for client, _ in devices.delivered) == ["anna", "bert"]
    assert 1.0 < time.monotonic() - began < 15.0

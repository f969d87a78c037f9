"""A client without a model, for tests of everything between strategy and wire: it adds a constant to each tensor, or is faulty."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.clients.declining import decline_on_error
from fedtune.config import Config
from fedtune.contracts.adapter_state import AdapterSpec, AdapterState
from fedtune.contracts.plan import Update, matching
from fedtune.contracts.strategy import Strategy
from fedtune.contracts.wire import read_message, read_offer
from fedtune.errors import UpdateError
from fedtune.exchange import Exchange, Plain
from fedtune.rounds.bridge import Bridge
from fedtune.rounds.delivery import Delivery
from fedtune.rounds.membership import JoinPolicy
from fedtune.runs.directory import RunDirectory
from fedtune.simulations.engines.grid import InProcessGrid
from fedtune.strategies.fedavg import FedAvg


def lora_state(*, fill: float | None = None, seed: int = 0, version: int = 0) -> AdapterState:
    """Two LoRA modules of awkward shapes (5→3 of rank 2, 3→7 of rank 1) and a head."""
    shapes = {"q.lora_A": (2, 5), "q.lora_B": (3, 2), "up.lora_A": (1, 3), "up.lora_B": (7, 1), "head.weight": (4, 7)}
    gen = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=gen) if fill is None else torch.full(s, fill) for n, s in shapes.items()}
    return AdapterState(
        tensors, AdapterSpec(method="lora", base="b" * 64, version=version, ranks={"q": 2, "up": 1}, scaling={"q": 2.0, "up": 0.5})
    )


def fake_client_app(examples: Mapping[str, int], faults: Mapping[str, Any] | None = None) -> ClientApp:
    """Client `c` adds its number of examples to each tensor that its plan trains. `faults[c]`: (round, arrays, text) → the same, or raises.

    Tensors that it does not receive are those of `lora_state(fill=0.0)`, as on the server.
    """
    app, ids, faults = ClientApp(), sorted(examples), faults or {}

    def client_id(context: Context) -> str:
        return ids[int(context.node_config["partition-id"])]

    @app.query()
    @decline_on_error
    def hello(message: Message, context: Context) -> Message:
        client = client_id(context)
        fields = {"client": client, "device_class": "", "examples": examples[client], "held_out": 0, "base": "b" * 64}
        fields |= {"shifts": [], "remembers": True}
        return Message(RecordDict({"hello": ConfigRecord({"json": json.dumps(fields)})}), reply_to=message)

    @app.query("offer")
    @decline_on_error
    def offer(message: Message, context: Context) -> Message:
        read_offer(message.content)
        return Message(RecordDict({"offer": ConfigRecord({"accepted": True})}), reply_to=message)

    @app.train()
    @decline_on_error
    def turn(message: Message, context: Context) -> Message:
        client, received = client_id(context), read_message(message.content)
        plan = received.plan
        assert plan is not None
        message.content.array_records.pop("adapter")  # clients may empty their records
        start = received.adapter.replace({**lora_state(fill=0.0).tensors, **received.adapter.tensors})
        trained = start.replace({n: start[n] + examples[client] for n in matching(start.tensors, plan.train)})
        sent = start.replace({n: trained.tensors.get(n, start[n]) for n in matching(start.tensors, plan.send)})
        update = Update(
            client=client,
            round=plan.round,
            base_version=plan.base_version,
            adapter=sent,
            examples=examples[client],
            metrics={"train_loss": 1.0, "start_loss": 1.0},
            measurements={"steps": 3, "lr_sum": 3 * max(plan.lr, plan.lr_last)},
        )
        arrays, text = sent.to_arrays(), update.to_json()
        if client in faults:
            arrays, text = faults[client](plan.round, arrays, text)
        return Message(
            RecordDict({"adapter": arrays, "update": ConfigRecord({"json": text, "spec": sent.spec.to_json()})}), reply_to=message
        )

    @app.evaluate()
    @decline_on_error
    def score(message: Message, context: Context) -> Message:
        metrics = {"accuracy": examples[client_id(context)] / 100}
        return Message(RecordDict({"metrics": ConfigRecord({"json": json.dumps(metrics)})}), reply_to=message)

    return app


class RecordingObserver:
    """Records the events of a run."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.clients: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def client_known(self, client: str, node: int, device_class: str) -> None: ...

    def round_started(self, round: int, rounds: int, cohort: Sequence[str]) -> None: ...

    def client_done(self, client: str, dropped: str | None) -> None: ...

    def round_done(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> None:
        self.records.append(record)
        self.clients.extend(clients)

    def note(self, text: str) -> None:
        self.notes.append(text)


def fake_bridge(
    path: Path,
    app: ClientApp,
    nodes: int,
    config: Config,
    *,
    strategy: Strategy | None = None,
    exchange: Exchange | None = None,
    initial: AdapterState | None = None,
    patience_s: float = 10.0,
    expected_clients: int | None = None,
    delivery: Callable[[RecordingObserver], Delivery] | None = None,
) -> tuple[Bridge, RecordingObserver]:
    """A bridge with fake clients, with a learning rate that allows their large steps; resumes an existing run directory."""
    if config.client.lr == Config().client.lr:
        config = dataclasses.replace(config, client=dataclasses.replace(config.client, lr=100.0, schedule="constant", steps=3))
    run = RunDirectory(path, config) if (path / "checkpoints").is_dir() else _new(path, config)
    observer = RecordingObserver()
    bridge = Bridge(
        grid=InProcessGrid(app, nodes),
        strategy=strategy or FedAvg(),
        exchange=exchange or Plain(),
        config=config,
        run=run,
        initial=initial or lora_state(fill=0.0),
        found=run.newest()[0],
        metric=("accuracy", True),
        evaluate=lambda s: {"accuracy": float(s.adapter["head.weight"].mean())},
        observer=observer,
        join=JoinPolicy(patience_s=patience_s, expected_clients=expected_clients),
        delivery=delivery and delivery(observer),
    )
    return bridge, observer


def _new(path: Path, config: Config) -> RunDirectory:
    (path / "checkpoints").mkdir(parents=True)
    return RunDirectory(path, config)


def fail(sentence: str) -> Any:
    """A fault that raises."""

    def act(round: int, arrays: Any, text: str) -> Any:
        raise UpdateError(sentence)

    return act

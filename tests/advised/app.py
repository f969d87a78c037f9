"""The advice in a client's replies to the server: a message that it cannot use, memory that runs out, a precision that does not fit."""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from flwr.app import Message, RecordDict

from fedtune.clients import loaded_model
from fedtune.clients.deployed import Device, read_hello
from fedtune.clients.devices.fitting import precisions
from fedtune.clients.host import ClientHost
from fedtune.config import Config, DeviceClass, EvalConfig, ModelConfig, to_dict
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.wire import MessageWriter
from fedtune.privacy.floor import Floor
from fedtune.rounds.planning import base_plan
from tests.advised.rows import Place, error_of, follows
from tests.clients.devices.test_choice import SHAPES
from tests.clients.test_host import ask
from tests.fakes import fake_bridge, fake_client_app
from tests.tiny import tiny_config, tiny_llama
from tests.working import host_for


def why(reply: Message) -> str:
    """Why a client declines; "" if it does not."""
    return str(reply.content.config_records["declined"]["why"]) if "declined" in reply.content.config_records else ""


def make_host(place: Place, **changes: Any) -> tuple[Config, ClientHost]:
    flower.identify_process(1)
    folder = place.keep("client", lambda path: (path.mkdir(), tiny_config(path)))
    config = dataclasses.replace(tiny_config(folder), **changes)
    return config, host_for(config)


def train_message(config: Config, adapter: AdapterState, **changes: Any) -> RecordDict:
    """A train message."""
    plan = dataclasses.replace(base_plan(config, 1, "c0", 0), **changes)
    return MessageWriter(1, ()).write(adapter, held=(), plan=plan)


@follows("the train message has no plan: run the same version of fedtune on server and client")
def _(place: Place) -> Iterator[str]:
    config, host = make_host(place)
    for content in (MessageWriter(1, ()).write(host.space.initial, held=()), train_message(config, host.space.initial)):
        yield why(ask(host, "train", content))


@follows("which the server did not send: run the same version of fedtune on both sides")
def _(place: Place) -> Iterator[str]:
    config, host = make_host(place)
    whole = host.space.initial
    for adapter in (whole.subset([n for n in whole.tensors if n.endswith("lora_A")]), whole):
        yield why(ask(host, "train", train_message(config, adapter, codec="int8")))


@follows("this device does not report exact scores of its rows (--min-privacy): set eval.clients=0")
def _(place: Place) -> Iterator[str]:
    host = dataclasses.replace(make_host(place)[1], floor=Floor(kind="record", epsilon=None, delta=1e-5, client="c0", runs=place.folder))
    error = why(ask(host, "evaluate", MessageWriter(1, ()).write(host.space.initial, held=())))
    yield error
    for clients, asked in ((-1, True), (int(error.rpartition("=")[2]), False)):  # with the advised 0 it asks no client for scores
        run = Config(rounds=1, clients_per_round=2, eval=EvalConfig(clients=clients))
        bridge, observer = fake_bridge(place.folder / str(clients), fake_client_app({"a": 2, "b": 3}), 2, run)
        bridge.loop()
        assert all(("clients_mean" in record) == asked for record in observer.records)
    yield ""


# -- memory that runs out outside training (training halves its micro-batches by itself) ---------------------------------------------------


def scarce(place: Place, where: str, entries: int) -> None:
    """The device has memory for batches of this many tokens."""
    module, name = where.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def limit(model: Any, batch: Any, task: Any) -> Any:
        if batch["input_ids"].numel() > entries:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, task)

    place.patch.setattr(where, limit)


@follows("out of memory: lower eval.batch_size or task.max_length")
def _(place: Place) -> Iterator[str]:
    scarce(place, "fedtune.models.evaluation.counted_logits", 20)
    config, _ = make_host(place)
    for values in ({}, {"eval": EvalConfig(batch_size=1)}, {"task": dataclasses.replace(config.task, max_length=4)}):
        _, host = make_host(place, **{"eval": EvalConfig(batch_size=4), **values})
        yield why(ask(host, "evaluate", MessageWriter(1, ()).write(host.space.initial, held=())))


@follows("out of memory: lower client.batch_size or task.max_length")
def _(place: Place) -> Iterator[str]:
    scarce(place, "fedtune.clients.turns.slora.loss_sum", 20)
    config, _ = make_host(place)
    for values in ({}, {"batch_size": 1}, {"max_length": 4}):
        task = dataclasses.replace(config.task, max_length=values.pop("max_length", 16))
        _, host = make_host(place, task=task)
        content = train_message(config, host.space.initial, **{"turn": "slora", "params": {"stage": "gradient"}, "batch_size": 4, **values})
        yield why(ask(host, "train", content))


@follows("out of memory: set model.precision=bf16, int8 or nf4, or take a smaller backbone")
def _(place: Place) -> Iterator[str]:
    config, _ = make_host(place)
    real = loaded_model.load_backbone

    def limit(model: ModelConfig, *args: Any, **more: Any) -> Any:
        if model.precision == "fp32" and model.name == config.model.name:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, *args, **more)

    place.patch.setattr(loaded_model, "load_backbone", limit)
    smaller = str(tiny_llama(place.folder / "smaller"))
    # the rows of this backbone are too short for nf4, whose advice is followed by another row
    for model in ({}, {"precision": "bf16"}, {"precision": "int8"}, {"name": smaller}):
        _, host = make_host(place, model=dataclasses.replace(config.model, **model))
        yield why(ask(host, "query", RecordDict()))


# -- a device's own backbone ---------------------------------------------------------------------------------------------------------------


def support_error(precision: str, **shapes: Any) -> str:
    """The error of a device of this precision, for a backbone and a machine with these `Shapes`."""
    return error_of(lambda: precisions(Config(), DeviceClass(precision=precision), dataclasses.replace(SHAPES, **shapes)))


@follows("model.precision={} needs bitsandbytes: install it, or take bf16")
def _(place: Place) -> Iterator[str]:
    without = {name: SHAPES.compute[name] for name in ("fp32", "bf16")}
    yield support_error("int8", compute=without)
    yield support_error("int8")
    yield support_error("bf16", compute=without)


@follows("no layer of this backbone has a row length that is a multiple of 64: take int8 or bf16")
def _(place: Place) -> Iterator[str]:
    for precision in ("nf4", "int8", "bf16"):
        yield support_error(precision, whole=frozenset(SHAPES.linear))


@follows("the run name '{}' from the server is not a plain folder name: rename the run on the server")
def _(place: Place) -> Iterator[str]:
    for run in ("../../etc", "etc"):
        text = json.dumps({"config": to_dict(Config()), "run": run, "labels": []})
        yield error_of(lambda text=text: read_hello(text, Device(client="home-000", state=place.folder)))

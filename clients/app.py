"""The Flower ClientApp: says hello, trains by a Plan, evaluates. The same on every engine and on a device.

A turn is `prepare` (read the message, may this device take part?), training, and `finish` (the reply). An engine that trains many clients
at once calls the two ends itself; the messages are the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.clients.declining import Decline, declining
from fedtune.clients.devices import device_of, is_offline, virtual_seconds
from fedtune.clients.trainer import Turn, train
from fedtune.clients.workspace import Workspace, workspace
from fedtune.config import Config, DeviceClass, to_dict
from fedtune.data import Example
from fedtune.errors import DataError, PlanError
from fedtune.plan import Plan, Update, matching
from fedtune.state import AdapterSpec, AdapterState


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A turn that can begin.

    Args:
        message: What asked for it.
        plan: The server's plan.
        start: The tensors that it starts from.
        examples: The client's training rows.
        device: The simulated device; None where none is.
        device_class: Its name.
    """

    message: Message
    plan: Plan
    start: AdapterState
    examples: Sequence[Example]
    device: DeviceClass | None
    device_class: str

    @property
    def max_steps(self) -> int | None:
        return self.device.max_steps if self.device else None


def make_client_app(config: Config) -> ClientApp:
    """The ClientApp of one experiment."""
    config_json = json.dumps(to_dict(config))
    app = ClientApp()

    @app.query()
    @declining
    def hello(message: Message, context: Context) -> Message:
        space = workspace(config_json)
        client = client_of(space, context)
        rows = space.federation.clients[client]
        said = {
            "client": client,
            "device_class": rows.device_class,
            "examples": len(rows.train),
            "held_out": len(rows.held_out),
            "base": space.backbone.fingerprint,
        }
        return Message(RecordDict({"hello": ConfigRecord({"json": json.dumps(said)})}), reply_to=message)

    @app.train()
    @declining
    def turn(message: Message, context: Context) -> Message:
        space = workspace(config_json)
        todo = prepare(space, message, context)
        space.live.load(todo.start)
        turned = train(space.live, todo.examples, todo.plan, space.config.task, pad_id=space.pad_id, max_steps=todo.max_steps)
        return finish(space, todo, space.live.read(version=todo.plan.base_version), turned)

    @app.evaluate()
    @declining
    def score(message: Message, context: Context) -> Message:
        space = workspace(config_json)
        (reply,) = score_together(space, [(message, context)])
        return reply

    return app


def score_together(space: Workspace, asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Replies to evaluate messages that all carry the adapter of the first."""
    rows = [space.examples(client_of(space, context), "held_out") for _, context in asked]
    found = space.score(_received(asked[0][0]), *rows)
    replies = [RecordDict({"metrics": ConfigRecord({"json": json.dumps(metrics)})}) for metrics in found]
    return [Message(content, reply_to=message) for content, (message, _) in zip(replies, asked, strict=True)]


def prepare(space: Workspace, message: Message, context: Context) -> Prepared:
    """Read a train message.

    Raises:
        PlanError: The plan is not understood, or is another client's.
        Decline: The device is offline this round.
        DataError: The client has nothing to learn from.
        UpdateMismatch: The adapter cannot be read.
    """
    client = client_of(space, context)
    plan = Plan.from_json(str(message.content.config_records["plan"]["json"]))
    if plan.client != client:
        raise PlanError(f"the plan is for client '{plan.client}', this is '{client}'")
    rows = space.federation.clients[client]
    device = device_of(space.config.devices, rows.device_class)
    if is_offline(device, space.config.seed, plan.round, client):
        raise Decline("offline", "the device is offline this round")
    examples = space.examples(client, "train")
    if not examples:
        raise DataError(f"client {client} has no training row of two tokens or more: nothing to learn from")
    start = _received(message)
    return Prepared(message=message, plan=plan, start=start, examples=examples, device=device, device_class=rows.device_class)


def finish(space: Workspace, todo: Prepared, trained: AdapterState, turned: Turn) -> Message:
    """The reply to a train message: what the plan asks to be sent, and what the turn cost."""
    plan = todo.plan
    sent = trained.subset(matching(trained.tensors, plan.send)).replace(version=plan.base_version)
    moved = todo.start.nbytes + sent.nbytes
    update = Update(
        client=plan.client,
        round=plan.round,
        base_version=plan.base_version,
        adapter=sent,
        examples=len(space.federation.clients[plan.client].train),
        metrics={"train_loss": turned.loss},
        measurements={
            "steps": turned.steps,
            "seconds": turned.seconds,
            "peak_mb": turned.peak_mb,
            "virtual_s": virtual_seconds(todo.device, turned.steps, moved, seed=space.config.seed, round=plan.round, client=plan.client),
        },
        device_class=todo.device_class,
    )
    said = ConfigRecord({"json": update.to_json(), "spec": sent.spec.to_json()})
    return Message(RecordDict({"adapter": sent.to_arrays(), "update": said}), reply_to=todo.message)


def client_of(space: Workspace, context: Context) -> str:
    """The logical id of the node's client."""
    return space.client_ids[int(context.node_config["partition-id"])]


def _received(message: Message) -> AdapterState:
    spec = AdapterSpec.from_json(str(message.content.config_records["spec"]["json"]))
    return AdapterState.from_arrays(message.content.array_records["adapter"], spec)

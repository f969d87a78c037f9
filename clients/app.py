"""The Flower ClientApp: says hello, trains by a Plan, evaluates. The same on every engine and on a device."""

import json

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.clients.declining import decline, declining
from fedtune.clients.devices import device_of, is_offline, virtual_seconds
from fedtune.clients.trainer import train
from fedtune.clients.workspace import Workspace, workspace
from fedtune.config import Config, to_dict
from fedtune.errors import PlanError
from fedtune.plan import Plan, Update, matching
from fedtune.state import AdapterSpec, AdapterState

def make_client_app(config: Config) -> ClientApp:
    """The ClientApp of one experiment."""
    config_json = json.dumps(to_dict(config))
    app = ClientApp()

    @app.query()
    @declining
    def hello(message: Message, context: Context) -> Message:
        space, client = _who(config_json, context)
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
        space, client = _who(config_json, context)
        plan = Plan.from_json(str(message.content.config_records["plan"]["json"]))
        if plan.client != client:
            raise PlanError(f"the plan is for client '{plan.client}', this is '{client}'")
        rows = space.federation.clients[client]
        device = device_of(space.config.devices, rows.device_class)
        if is_offline(device, space.config.seed, plan.round, client):
            return decline(message, "offline", "the device is offline this round")
        start = _received(message)
        space.live.load(start)
        turned = train(
            space.live,
            space.examples(client, "train"),
            plan,
            space.config.task,
            pad_id=space.pad_id,
            max_steps=device.max_steps if device else None,
        )
        trained = space.live.read(version=plan.base_version)
        sent = trained.subset(matching(trained.tensors, plan.send))
        update = Update(
            client=client,
            round=plan.round,
            base_version=plan.base_version,
            adapter=sent,
            examples=len(rows.train),
            metrics={"train_loss": turned.loss},
            measurements={
                "steps": turned.steps,
                "seconds": turned.seconds,
                "peak_mb": turned.peak_mb,
                "virtual_s": virtual_seconds(device, turned.steps, start.nbytes + sent.nbytes),
            },
            device_class=rows.device_class,
        )
        records = {
            "adapter": sent.to_arrays(),
            "update": ConfigRecord({"json": update.to_json(), "spec": sent.spec.to_json()}),
        }
        return Message(RecordDict(records), reply_to=message)

    @app.evaluate()
    @declining
    def score(message: Message, context: Context) -> Message:
        space, client = _who(config_json, context)
        metrics = space.score(_received(message), space.examples(client, "held_out"))
        return Message(RecordDict({"metrics": ConfigRecord({"json": json.dumps(metrics)})}), reply_to=message)

    return app


def _received(message: Message) -> AdapterState:
    spec = AdapterSpec.from_json(str(message.content.config_records["spec"]["json"]))
    arrays: ArrayRecord = message.content.array_records["adapter"]
    return AdapterState.from_arrays(arrays, spec)


def _who(config_json: str, context: Context) -> tuple[Workspace, str]:
    space = workspace(config_json)
    return space, space.client_ids[int(context.node_config["partition-id"])]

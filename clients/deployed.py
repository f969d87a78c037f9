"""The ClientApp of a real device: the experiment comes with the server's hello; the rows, the profile and the folder are the device's own.

What a server may decide is what the experiment is. What it may not: run code that a model repository brings along, have the device open a
path that was not given on the device itself, or have it count its privacy anywhere but in its own folder.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.clients.app import make_client_app
from fedtune.clients.declining import declining, naming
from fedtune.clients.devices import measure_device
from fedtune.clients.devices.fitting import for_device
from fedtune.clients.host import ClientHost
from fedtune.clients.store import Storage
from fedtune.clients.workspace import Workspace
from fedtune.config import Config, DeviceClass, DevicesConfig, ModelConfig, from_dict, to_dict
from fedtune.contracts.hello import ServerHello
from fedtune.contracts.privacy_terms import terms
from fedtune.contracts.task import task_of
from fedtune.data.columns import demo_columns, own_rows_columns
from fedtune.errors import ConfigError, PlanError
from fedtune.privacy.floor import Floor
from fedtune.storage.atomic import write_text
from fedtune.storage.ids import is_run_name
from fedtune.storage.parsing import parse_yaml, read_text

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
HELLO = "hello.json"  # in the device's folder: the last one that it answered


@dataclass(frozen=True, kw_only=True)
class Device:
    """What belongs to the device.

    Args:
        client: Its logical id.
        state: Folder of what it keeps between turns, runs and restarts.
        data: File, folder or glob of its rows; None takes its part of the built-in demo and takes part in nothing else.
        model: Folder of the backbone; None takes the built-in one, or fetches it from the hub by the server's name for it.
        min_privacy: Least privacy that a turn must apply on the device, `record` or `user`; None takes the server's word.
        max_epsilon: Most that all turns may cost together, in every run; None bounds nothing.
        delta: δ of `max_epsilon`.
        device: What it can do: `auto`, the name of one of the scenario's device classes, or a YAML file; None takes every plan as it is.
    """

    client: str
    state: Path
    data: str | None = None
    model: str | None = None
    min_privacy: str | None = None
    max_epsilon: float | None = None
    delta: float = 1e-5
    device: str | None = None


def make_app(settings: Mapping[str, Any]) -> ClientApp:
    """The ClientApp of this device, for whatever experiment the server's last hello named.

    The hello is kept on disk: a server does not see that a client was away for a moment only, and says nothing anew.
    """
    device, app = Device(**{**settings, "state": Path(settings["state"])}), ClientApp()
    current, floor = list[tuple[str, ClientHost, ClientApp]](), floor_of(device)

    def begin(said: str) -> ClientApp:
        config, run = read_hello(said, device)
        own = next(iter(config.devices.classes.values()), None)
        if own is not None:
            config = for_device(config, own)
        loaded = _loaded(config, run, *current[0][:2]) if current else None
        current.clear()  # what it has loaded makes room
        host = ClientHost(config, Storage.in_folder(device.state / run / "clients", config), own, floor, loaded)
        current.append((run, host, make_client_app(host)))
        return current[0][2]

    def going_on() -> ClientApp:
        return current[0][2] if current else begin(_kept_hello(device))

    @app.query()
    @declining
    def hello(message: Message, context: Context) -> Message:
        with naming(device.client):
            said = _said(message)
            reply = begin(said)(message, context)
            _keep_hello(device, said)
        return reply

    @app.train()
    @declining
    def turn(message: Message, context: Context) -> Message:
        return going_on()(message, context)

    @app.evaluate()
    @declining
    def evaluate(message: Message, context: Context) -> Message:
        return going_on()(message, context)

    return app


def _loaded(config: Config, run: str, before: str, host: ClientHost) -> Workspace | None:
    """What the host of the run `before` has loaded, where it can be used for this one; None where something else must be loaded."""
    if host.config != config:
        return None
    if run != before:
        host.space.rebase((), ())  # the other run's shifts have the same rounds' numbers
    return host.space


def read_hello(text: str, device: Device) -> tuple[Config, str]:
    """The experiment as this device takes part in it, and the name of the run.

    Raises:
        PlanError: The hello names no experiment.
        ConfigError: The experiment is not one that this version of fedtune knows, or asks for what a device does not do.
    """
    hello = ServerHello.from_json(text)
    if not is_run_name(hello.run):
        raise PlanError(f"the server calls its run '{hello.run[:40]}', which is no plain folder name")
    return own_config(from_dict(dict(hello.config)), device, list(hello.labels)), hello.run


def own_config(config: Config, device: Device, labels: list[str]) -> Config:
    """The server's experiment with this device's rows and profile in it.

    Raises:
        ConfigError: The experiment asks for what a device does not do.
        Decline: It promises less privacy than the device accepts.
    """
    if config.model.trust_remote_code:
        raise ConfigError("the server asks to run code that comes with a model (model.trust_remote_code): this device does not do that")
    if (floor := floor_of(device)) is not None:
        floor.check(str(terms(config)["privacy"]))
        # drawn from the run's seed, the noise could be subtracted again by the server, which knows it
        config = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, secure_rng=True))
    data = dataclasses.replace(
        config.data,
        client=device.client,
        labels=labels if task_of(config.task).classes else [],
        path=device.data or "",
        test_path=None,
    )
    partition = config.partition
    if device.data is None and data.source != "demo":  # not of the hub either: its data sets can point at files of this device
        raise ConfigError(
            f"the server's rows are its own (data.source={data.source}), and this device opens no file that only a server names: give this"
            " device's rows with --data"
        )
    if device.data is not None:
        if data.source == "demo":  # its columns under the names that the demo has
            data = demo_columns(data)
        columns = own_rows_columns(dataclasses.replace(config, data=data))
        data = dataclasses.replace(data, source="local", test_fraction=0.0, limit=None, client_from_file=False, columns=columns)
        partition = dataclasses.replace(partition, kind="one")
    engine = dataclasses.replace(config.engine, kind="inprocess", batched="none")
    devices = DevicesConfig(classes=profile_of(device.device, config))
    model, own = _own_model(config.model, device), Config()
    return dataclasses.replace(
        config,
        model=model,
        data=data,
        partition=partition,
        engine=engine,
        devices=devices,
        resume=None,
        output_dir=own.output_dir,
    )


def _own_model(model: ModelConfig, device: Device) -> ModelConfig:
    """The server's backbone where this device has it: in the folder given here, or under a name that only the hub can mean.

    Raises:
        ConfigError: The server's name is, or could be, a path on this device.
    """
    if model.source != "hub":
        return model
    if device.model is not None:
        return dataclasses.replace(model, name=device.model, revision=None)
    for key, value, wanted in (("name", model.name, _HUB_NAME), ("revision", model.revision or "main", _REVISION)):
        if not wanted.fullmatch(value) or ".." in value or (key == "name" and Path(value).exists()):
            raise ConfigError(
                f"the server says model.{key}={value[:80]}, which is or could be a path on this device, and it opens none that only a"
                " server names: give the folder of the backbone with --model"
            )
    return model


def floor_of(device: Device) -> Floor | None:
    """The least privacy that the device accepts; None where its operator set none."""
    if device.min_privacy is None:
        return None
    return Floor(kind=device.min_privacy, epsilon=device.max_epsilon, delta=device.delta, client=device.client, runs=device.state)


def profile_of(asked: str | None, config: Config) -> dict[str, DeviceClass]:
    """This device's profile under its name; empty where it takes every plan as it is.

    Args:
        asked: As `Device.device`.
        config: The server's experiment, whose device classes can be named.

    Raises:
        ConfigError: There is no such class or file, or the file holds something else.
    """
    classes = config.devices.classes
    if asked is None:
        return {}
    if asked == "auto":
        return {"measured": measure_device()}
    if not asked.endswith((".yaml", ".yml")):
        if asked not in classes:
            known = f"the scenario's classes are {', '.join(classes)}" if classes else "the scenario names none"
            raise ConfigError(f"--device {asked} is no device class: {known}; auto measures, FILE.yaml describes")
        return {asked: classes[asked]}
    try:
        values = parse_yaml(read_text(Path(asked)))
    except (OSError, ValueError) as bad:
        raise ConfigError(f"cannot read the device profile {asked}: {str(bad).splitlines()[0]}") from None
    name = Path(asked).stem
    whole = to_dict(Config())
    whole["devices"]["classes"] = {name: values}
    return from_dict(whole).devices.classes


def _said(message: Message) -> str:
    try:
        return str(message.content.config_records["hello"]["json"])
    except KeyError:
        raise PlanError("the server's hello says nothing: the peers run different versions of fedtune") from None


def _keep_hello(device: Device, said: str) -> None:
    try:
        write_text(device.state / HELLO, said, durable=False)
    except OSError as bad:
        raise ConfigError(f"cannot keep anything in {device.state}: {bad.strerror}; free the disk or give another --state") from None


def _kept_hello(device: Device) -> str:
    try:
        return read_text(device.state / HELLO)
    except OSError:
        raise PlanError("the server has not said which experiment this is: it must say hello before it asks for work") from None

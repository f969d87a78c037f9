"""The ClientApp of a real device. The server's hello contains the experiment; rows, profile and folder belong to the device.

The server defines the experiment. It cannot make the device run code from a model repository, open a path that was not given on the device
itself, or record its privacy spending outside the device's folder.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.clients.app import make_client_app
from fedtune.clients.declining import client_named, decline_on_error
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
from fedtune.errors import ConfigError, Decline, PlanError
from fedtune.privacy.floor import Floor
from fedtune.storage.atomic import write_text
from fedtune.storage.ids import is_run_name
from fedtune.storage.parsing import parse_yaml, read_text

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
HELLO = "hello.json"  # file in the device's folder: the last hello that the device answered


@dataclass(frozen=True, kw_only=True)
class Device:
    """The settings of one device.

    Args:
        client: Its logical id.
        state: Folder of its state, which persists across turns, runs and restarts.
        data: File, folder or glob of its rows; None uses the client's part of the built-in demo and rejects every other experiment.
        model: Folder of the backbone; None uses the built-in model, or the hub model that the server names.
        min_privacy: Minimum privacy of every turn, `record` or `user`; None accepts any.
        max_epsilon: Total privacy budget ε over all turns of all runs; None sets no budget.
        delta: δ of `max_epsilon`.
        signing_pub: File of the public key that signs the models of the server; None installs no signed model.
        unsigned: Whether to install models without a signature (--insecure).
        package: Weight format of installed models: int8, int4, `stored` (as in the checkpoint), or `auto`, by the device's memory.
        device: Its profile: `auto`, the name of one of the scenario's device classes, or a YAML file; None accepts every plan unchanged.
    """

    client: str
    state: Path
    data: str | None = None
    model: str | None = None
    min_privacy: str | None = None
    max_epsilon: float | None = None
    delta: float = 1e-5
    signing_pub: str | None = None
    unsigned: bool = False
    package: str = "auto"
    device: str | None = None


Install = Callable[[ClientHost, Message], Message]


def make_app(settings: Mapping[str, Any], installer: Callable[[Device], Install] | None = None) -> ClientApp:
    """The ClientApp of this device, for the experiment of the server's last hello.

    Args:
        settings: The fields of `Device`.
        installer: Device → the function that answers the messages of a delivery; None installs no models.

    The hello is stored on disk, because a server does not notice a quick restart of the client and does not repeat its hello.
    """
    device, app = Device(**{**settings, "state": Path(settings["state"])}), ClientApp()
    current, floor = list[tuple[str, ClientHost, ClientApp]](), floor_of(device)
    install = None if installer is None else installer(device)

    def start(hello: str) -> ClientApp:
        config, run = read_hello(hello, device)
        own = next(iter(config.devices.classes.values()), None)
        if own is not None:
            config = for_device(config, own)
        loaded = _reusable(config, run, *current[0][:2]) if current else None
        current.clear()  # free the old model before loading another
        host = ClientHost(config, Storage.in_folder(device.state / run / "clients", config), own, floor, loaded)
        current.append((run, host, make_client_app(host)))
        return current[0][2]

    def current_app() -> ClientApp:
        return current[0][2] if current else start(_load_hello(device))

    def current_host() -> ClientHost:
        current_app()
        return current[0][1]

    @app.query()
    @decline_on_error
    def hello(message: Message, context: Context) -> Message:
        with client_named(device.client):
            text = _hello_of(message)
            reply = start(text)(message, context)
            _save_hello(device, text)
        return reply

    @app.train()
    @decline_on_error
    def turn(message: Message, context: Context) -> Message:
        return current_app()(message, context)

    @app.evaluate()
    @decline_on_error
    def evaluate(message: Message, context: Context) -> Message:
        return current_app()(message, context)

    @app.query("deliver")
    @decline_on_error
    def deliver(message: Message, context: Context) -> Message:
        if install is None:
            raise Decline("model", "this program installs no models")
        return install(current_host(), message)

    return app


def _reusable(config: Config, run: str, before: str, host: ClientHost) -> Workspace | None:
    """The workspace that the host of the run `before` has loaded; None if this run needs another."""
    if host.config != config:
        return None
    if run != before:
        host.space.rebase((), ())  # shifts are identified by their round, which starts at 1 in both runs
    return host.space


def read_hello(text: str, device: Device) -> tuple[Config, str]:
    """The experiment with this device's own settings, and the name of the run.

    Raises:
        PlanError: The hello has no valid run name.
        ConfigError: This version of fedtune does not know a setting of the experiment, or the device rejects it.
    """
    hello = ServerHello.from_json(text)
    if not is_run_name(hello.run):
        raise PlanError(f"the run name '{hello.run[:40]}' from the server is not a plain folder name: rename the run on the server")
    return own_config(from_dict(dict(hello.config)), device, list(hello.labels)), hello.run


def own_config(config: Config, device: Device, labels: list[str]) -> Config:
    """The server's experiment with this device's rows and profile.

    Raises:
        ConfigError: The device rejects a setting of the experiment.
        Decline: The experiment has less privacy than the device accepts.
    """
    if config.model.trust_remote_code:
        raise ConfigError("the server sets model.trust_remote_code, and a device runs no code from a model repository: set it to false")
    if (floor := floor_of(device)) is not None:
        floor.check(str(terms(config)["privacy"]))
        # the server knows the run's seed and could subtract noise drawn from it
        config = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, secure_rng=True))
    data = dataclasses.replace(
        config.data,
        client=device.client,
        labels=labels if task_of(config.task).classes else [],
        path=device.data or "",
        test_path=None,
    )
    partition = config.partition
    if device.data is None and data.source != "demo":  # not the hub either: hub data sets can reference files of this device
        raise ConfigError(
            f"this device has no rows, and it opens no file that only the server names (data.source={data.source}): give this device's rows"
            " with --data"
        )
    if device.data is not None:
        if data.source == "demo":  # the file has the demo's column names
            data = demo_columns(dataclasses.replace(config, data=data))
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
        peft=dataclasses.replace(config.peft, from_=None),  # the server sends what it starts from
        partition=partition,
        engine=engine,
        devices=devices,
        resume=None,
        output_dir=own.output_dir,
    )


def _own_model(model: ModelConfig, device: Device) -> ModelConfig:
    """The server's backbone on this device: the device's `model` folder, or a name that cannot be a path.

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
                f"the server sets model.{key}={value[:80]}, which is or could be a path on this device, and the device opens no path that"
                " only the server names: give the folder of the backbone with --model"
            )
    return model


def floor_of(device: Device) -> Floor | None:
    """The minimum privacy that the device accepts; None without `min_privacy`."""
    if device.min_privacy is None:
        return None
    return Floor(kind=device.min_privacy, epsilon=device.max_epsilon, delta=device.delta, client=device.client, runs=device.state)


def profile_of(device: str | None, config: Config) -> dict[str, DeviceClass]:
    """Name → profile of this device; empty if it accepts every plan unchanged.

    Args:
        device: As `Device.device`.
        config: The server's experiment with its device classes.

    Raises:
        ConfigError: The class or file does not exist, or the file is not a device profile.
    """
    classes = config.devices.classes
    if device is None:
        return {}
    if device == "auto":
        return {"measured": measure_device()}
    if not device.endswith((".yaml", ".yml")):
        if device not in classes:
            known = f"the scenario's classes are {', '.join(classes)}" if classes else "the scenario has none"
            raise ConfigError(f"--device {device}: no such device class, {known}; auto measures this machine, FILE.yaml reads a profile")
        return {device: classes[device]}
    try:
        values = parse_yaml(read_text(Path(device)))
    except (OSError, ValueError) as bad:
        raise ConfigError(f"cannot read the device profile {device}: {str(bad).splitlines()[0]}") from None
    name = Path(device).stem
    whole = to_dict(Config())
    whole["devices"]["classes"] = {name: values}
    return from_dict(whole).devices.classes


def _hello_of(message: Message) -> str:
    try:
        return str(message.content.config_records["hello"]["json"])
    except KeyError:
        raise PlanError("the server's hello is empty: run the same version of fedtune on server and client") from None


def _save_hello(device: Device, hello: str) -> None:
    try:
        write_text(device.state / HELLO, hello, durable=False)
    except OSError as bad:
        raise ConfigError(f"cannot write to {device.state}: {bad.strerror}; free the disk or give another --state") from None


def _load_hello(device: Device) -> str:
    try:
        return read_text(device.state / HELLO)
    except OSError:
        raise PlanError("this device does not know the experiment: the server must send its hello before other messages") from None

"""A device opens no path that comes only from the server, in any key of the experiment."""

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune.clients.deployed import Device, read_hello
from fedtune.config import Config, DataConfig, ModelConfig, PartitionConfig, to_dict
from fedtune.data import load_federation
from fedtune.errors import FedtuneError, ModelError
from fedtune.models import checkpoint
from tests.tiny import texts, tiny_llama, write_rows

OPENED: list[str] = []
_recording = False


def _record(event: str, args: tuple[Any, ...]) -> None:
    if _recording and event in ("open", "os.listdir", "os.scandir") and args and isinstance(args[0], str | Path):
        OPENED.append(str(Path(args[0]).absolute()))


@functools.cache
def listen() -> None:
    sys.addaudithook(_record)  # added late, because Python cannot remove an audit hook and calls it in all later tests


def opened_paths(call: Callable[[], object]) -> list[str]:
    """The paths that a call opens or lists; a refusal ends it early."""
    global _recording
    listen()
    OPENED.clear()
    _recording = True
    try:
        call()
    except FedtuneError:
        pass
    finally:
        _recording = False
    return OPENED


def free_keys(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the experiment that takes any text."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {typing.get_origin(hint) or hint}
        if dataclasses.is_dataclass(hint):
            yield from free_keys(typing.cast(type, hint), f"{prefix}{f.name}.")
        elif kinds & {str} and not f.metadata["choices"]:
            yield prefix + f.name


USED: set[tuple[Device, str]] = set()  # results by hello, so that each hello is read once
KEYS = sorted(free_keys())


def test_the_keys_are_found() -> None:
    assert {"model.name", "model.revision", "data.name", "data.path", "data.test_path", "data.subset", "output_dir", "resume"} < set(KEYS)


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with rows, a data set and a model that the device's owner has not given to fedtune."""
    folder = tiny_llama(tmp_path / "secret")
    for name in ("train.jsonl", "test.jsonl"):
        write_rows(folder / name, texts(20))
    tiny_llama(folder / "org" / "model")
    monkeypatch.chdir(folder)

    def no_hub(config: ModelConfig, weights: bool) -> Path:
        raise ModelError("no network")

    monkeypatch.setattr(checkpoint, "_fetch", no_hub)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def hello(config: Config, changes: dict[str, str]) -> str:
    values = to_dict(config)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node[part]
        node[last] = value
    return json.dumps({"config": values, "run": "r", "labels": []})


def use(text: str, device: Device) -> None:
    """Read rows and backbone as a client does after a hello."""
    config, _ = read_hello(text, device)
    what = device, str((config.data, config.model, config.partition))
    if what in USED:
        return
    USED.add(what)
    load_federation(config)
    checkpoint.read_config(checkpoint.find_folder(config.model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows_from", "model_from", "given"),
    [("demo", "nano", False), ("local", "nano", False), ("hub", "nano", False), ("demo", "hub", False), ("local", "hub", True)],
)
def test_no_key_of_a_hello_opens_a_path(tmp_path: Path, secret: Path, rows_from: str, model_from: str, given: bool) -> None:
    model = tiny_llama(tmp_path / "own")
    rows = write_rows(tmp_path / "own.jsonl", texts(4))
    data = DataConfig(source=rows_from, homes=1, path="theirs.jsonl", name="a/b", prompt="{question}", answer="{reply}")
    config = Config(data=data, model=ModelConfig(source=model_from, name="a/b"), partition=PartitionConfig(kind="iid", clients=1))
    device = Device(client="home-000", state=tmp_path)
    if given:
        device = dataclasses.replace(device, data=str(rows), model=str(model))
        assert {str(rows), f"{model}/config.json"} <= set(opened_paths(partial(use, hello(config, {}), device)))
    for key in KEYS:
        # a bare builder name makes `datasets` read the working directory; a name with a folder of that name here opens it
        for value in (str(secret), f"{secret}/train.jsonl", "org/model", "json"):
            message = hello(config, {key: value})
            assert not [path for path in opened_paths(partial(use, message, device)) if path.startswith(str(secret))], f"{key}={value}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data.source": "local", "data.path": "/etc/passwd"},
            r"opens no file that only the server names \(data.source=local\): give this device's rows with --data",
        ),
        (
            {"data.source": "hub", "data.name": "ag_news"},
            r"opens no file that only the server names \(data.source=hub\): give this device's rows with --data",
        ),
        ({"model.source": "hub", "model.name": "/models/llama"}, "the server sets model.name=/models/llama.*with --model"),
        ({"model.source": "hub", "model.name": "org/model"}, "the server sets model.name=org/model.*with --model"),
        ({"model.source": "hub", "model.name": "a/b", "model.revision": "../../x"}, r"the server sets model.revision=\.\./\.\./x"),
    ],
)
def test_a_refusal_says_what_to_give(tmp_path: Path, secret: Path, changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(FedtuneError, match=sentence):
        read_hello(hello(Config(), changes), Device(client="home-000", state=tmp_path))


def test_the_device_s_own_settings_are_used(tmp_path: Path, secret: Path) -> None:
    device = Device(client="a", state=tmp_path, data="rows.jsonl", model=str(secret / "org" / "model"))
    config, _ = read_hello(hello(Config(), {"model.source": "hub", "model.name": "/theirs", "model.revision": "main"}), device)
    assert (config.data.source, config.data.path, config.data.test_path) == ("local", "rows.jsonl", None)
    assert (config.model.name, config.model.revision) == (device.model, None)
    config, _ = read_hello(hello(Config(), {"model.source": "hub", "model.name": "Qwen/Qwen2.5-0.5B"}), Device(client="a", state=tmp_path))
    assert config.model.name == "Qwen/Qwen2.5-0.5B"  # a name on the hub: no local folder has it


def test_an_adapter_in_a_model_folder_is_refused(secret: Path, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "fetched")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(secret)}))
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        checkpoint.read_config(folder)

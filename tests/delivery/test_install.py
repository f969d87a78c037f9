"""A device installs a delivered model completely or not at all, chooses the best of old, new and personal, and keeps the owner's choice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from transformers import AutoModelForSequenceClassification

from fedtune.clients.host import ClientHost
from fedtune.clients.loaded_model import LoadedModel
from fedtune.clients.workspace import Workspace
from fedtune.config import PeftConfig, PrivacyConfig, TaskConfig, to_dict
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.delivery import DeliveryState, Manifest
from fedtune.contracts.task import task_of
from fedtune.delivery import install
from fedtune.delivery.device import make_app
from fedtune.delivery.versions import Versions
from fedtune.inference.generate import generate_text
from fedtune.rounds.delivery import Offer
from tests.delivery.offers import delivery, prepare, write_keys
from tests.quick import quick
from tests.tiny import tiny_config

LABELS = ["0", "1", "2"]


class Device:
    """A device of a tiny experiment, whose worker can be killed and started again."""

    def __init__(self, folder: Path, experiment: dict[str, Any] | None = None, **settings: Any) -> None:
        self.folder, self.state = folder, folder / "state"
        self.config = tiny_config(folder, **(experiment or {}))
        self.private, public = write_keys(folder)
        self.server = delivery(folder, self.private)
        self.settings = {
            "client": "anna",
            "state": str(self.state),
            "data": str(folder / "rows.jsonl"),
            "model": str(folder / "model"),
            "signing_pub": str(public),
            **settings,
        }
        self.state.mkdir()
        self.initial = Workspace(self.config).initial
        self.app = self.start()
        self.ask("query", {"hello": ConfigRecord({"json": json.dumps({"config": to_dict(self.config), "run": "r", "labels": LABELS})})})

    def start(self) -> ClientApp:
        self.app = make_app(self.settings)
        return self.app

    def ask(self, kind: str, content: dict[str, ConfigRecord]) -> RecordDict:
        flower.identify_process(1)
        context = Context(run_id=1, node_id=7, node_config={"partition-id": 0, "num-partitions": 1}, state=RecordDict(), run_config={})
        reply = self.app(Message(RecordDict(content), 7, kind), context).content  # type: ignore[arg-type]
        if (declined := reply.config_records.get("declined")) is not None:
            raise AssertionError(declined["why"])
        return reply

    def adapter(self, version: int, scale: float = 0.0) -> AdapterState:
        """An adapter whose B are `scale` times a pattern; 0 changes nothing."""
        tensors = {
            n: t + scale * (n.endswith("lora_B")) * (1 + t.new_tensor(range(t.numel())).view(t.shape) % 3)
            for n, t in self.initial.tensors.items()
        }
        return self.initial.replace(tensors, version=version)

    def deliver(self, offer: Offer) -> DeliveryState:
        """Send the manifest, then each part, as the server does."""
        state = DeliveryState.from_content(self.ask("query.deliver", dict(offer.message(None).config_records)))
        while state.state == "wants":
            state = DeliveryState.from_content(self.ask("query.deliver", dict(offer.message(state.have).config_records)))
        return state

    @property
    def versions(self) -> Versions:
        return Versions(self.state)

    def record(self) -> dict[str, Any]:
        name = self.versions.current()
        assert name is not None
        return json.loads((self.state / "models/versions" / name / "record.json").read_text())


def offer_of(device: Device, round: int, scale: float, **plan: Any) -> Offer:
    return prepare(device.server, round, device.adapter(round, scale), **plan)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[float, float]:
    """Scores of adapters, the higher the better, by the first value of their first B, in place of a measurement."""
    found: dict[float, float] = {}

    def score(self: LoadedModel, state: AdapterState, *groups: Any) -> list[dict[str, float]]:
        first = next(t for n, t in state.tensors.items() if n.endswith("lora_B"))
        metric, higher = task_of(self.config.task).primary
        return [{metric: found[round(float(first.flatten()[0]), 3)] * (1 if higher else -1)} for _ in groups]

    monkeypatch.setattr(LoadedModel, "score", score)
    return found


def test_the_first_model_answers_from_its_package(tmp_path: Path) -> None:
    device = Device(tmp_path)
    offer = offer_of(device, 1, 0.01)
    assert device.deliver(offer) == DeliveryState(state="installed", chosen="global")
    current = device.state / "models/current"
    assert (current / "weights-int8.safetensors").is_file()
    assert isinstance(generate_text(current, "lamp", max_new_tokens=4), str)
    record = device.record()
    assert (record["run"], record["round"], record["chosen"]) == ("mine", 1, "global")
    assert record["scores"]["old"] is None
    assert record["bytes"] == sum(f.stat().st_size for f in current.resolve().rglob("*") if f.is_file())
    assert not any((device.state / "models/incoming").iterdir()), "the download is deleted"
    assert device.deliver(offer).state == "installed", "an offer that was answered already"


def test_the_best_of_old_and_new_stays(tmp_path: Path, scores: dict[float, float]) -> None:
    device = Device(tmp_path)
    scores |= {0.01: 0.5, 0.02: 0.4, 0.03: 0.5, 0.04: 0.9}
    states = [device.deliver(offer_of(device, n, n / 100)).state for n in (1, 2, 3, 4)]
    assert states == ["installed", "kept", "installed", "installed"], "an equal score takes the new one"
    assert device.record()["round"] == 4
    assert {k: abs(v) for k, v in device.record()["scores"].items()} == {"old": 0.5, "global": 0.9}
    assert [v.record.round for v in device.versions.names() if v.record] == [4, 3, 1]


@pytest.mark.parametrize(
    ("personal", "chosen"), quick([(0.7, "personal"), (0.5, "personal"), (0.4, "global")], (0.5, "personal"), (0.4, "global"))
)
def test_a_personal_model_is_compared_too(tmp_path: Path, scores: dict[float, float], personal: float, chosen: Any) -> None:
    device = Device(tmp_path)
    host_of(device).storage.store.write("anna", 1, device.adapter(1, 0.05).subset([n for n in device.initial.tensors if n.endswith("B")]))
    scores |= {0.01: 0.5, 0.05: personal}
    state = device.deliver(offer_of(device, 1, 0.01, keep=("*.lora_B",)))
    assert state == DeliveryState(state="installed", chosen=chosen)
    assert [device.record()["scores"][k] for k in ("old", "global", "personal")] == [None, -0.5, -personal]
    name = device.versions.current()
    stored = AdapterState.load(device.state / f"models/versions/{name}/source/adapter/fedtune.safetensors")
    first = next(t for n, t in stored.tensors.items() if n.endswith("lora_B"))
    assert round(float(first.flatten()[0]), 3) == (0.05 if chosen == "personal" else 0.01)


def host_of(device: Device) -> ClientHost:
    """A host that shares the device's folder with its app."""
    from fedtune.clients.store import Storage

    return ClientHost(device.config, Storage.in_folder(device.state / "r" / "clients", device.config))


@pytest.mark.parametrize("place", quick(["new_folder", "activate", "discard"], "activate"))
@pytest.mark.parametrize("before", [True, False])
def test_a_device_killed_at_any_step_has_the_old_or_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, before: bool
) -> None:
    device = Device(tmp_path)
    device.deliver(offer_of(device, 1, 0.0))
    old = device.versions.current()
    owner: Any = {"new_folder": install, "activate": Versions, "discard": install.Downloads}[place]
    real = getattr(owner, place)

    class Killed(BaseException):
        pass

    def kill(*args: Any, **more: Any) -> Any:
        if before:
            raise Killed
        if place == "new_folder":
            with real(*args, **more):
                pass
        else:
            real(*args, **more)
        raise Killed

    second = offer_of(device, 2, 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, kill)
        with pytest.raises(Killed):
            device.deliver(second)
    new = Manifest.from_json(second.text).name
    assert device.versions.current() in (old, new)
    assert isinstance(generate_text(device.state / "models/current", "lamp", max_new_tokens=4), str)
    if place == "new_folder" and not before:
        (device.state / "models/versions" / new).rmdir()  # the folder is never empty in the product: only this test makes it so
    device.start()
    assert device.deliver(second) == DeliveryState(state="installed", chosen="global")
    assert device.versions.current() == new
    assert not any((device.state / "models/incoming").iterdir())


def test_a_version_that_the_owner_left_is_not_made_current_again(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.deliver(offer_of(device, 1, 0.0))
    device.deliver(second := offer_of(device, 2, 0.0))
    device.versions.rollback()
    assert device.deliver(second).state == "installed"
    assert device.record()["round"] == 1
    device.deliver(offer_of(device, 3, 0.0))
    assert device.record()["round"] == 3


def test_a_clock_that_is_set_back_does_not_change_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path, package="stored")
    device.deliver(offer_of(device, 1, 0.0))
    monkeypatch.setattr(install.time, "time", lambda: 1000.0)
    device.deliver(offer_of(device, 2, 0.0))
    assert [v.record.round for v in device.versions.names() if v.record] == [2, 1]


def test_only_a_few_versions_are_kept(tmp_path: Path) -> None:
    device = Device(tmp_path, package="stored")
    for n in range(1, 6):
        device.deliver(offer_of(device, n, 0.0))
    assert [v.record.round for v in device.versions.names() if v.record] == [5, 4, 3]


@pytest.mark.parametrize(
    ("privacy", "settings"),
    quick([("record", {}), ("record", {"min_privacy": "record"}), user := ("user", {"min_privacy": "user"})], user),
)
def test_private_rows_do_not_reveal_the_choice(tmp_path: Path, privacy: str, settings: dict[str, Any]) -> None:
    experiment = {"privacy": PrivacyConfig(kind=privacy, where="client" if privacy == "user" else "server")}
    device = Device(tmp_path, experiment, **settings)
    assert device.deliver(offer_of(device, 1, 0.0)) == DeliveryState(state="done")
    assert device.record()["chosen"] == "global"


@pytest.mark.parametrize(
    ("package", "files"),
    quick([few := ("int4", ["weights-int4", "weights-int8"]), ("int8", ["weights-int8"]), ("stored", [])], few),  # the head is int8
)
def test_the_package_has_the_asked_format(tmp_path: Path, package: str, files: list[str]) -> None:
    device = Device(tmp_path, package=package)
    device.deliver(offer_of(device, 1, 0.0))
    assert [f for f in ("weights-int4", "weights-int8") if (device.state / f"models/current/{f}.safetensors").is_file()] == files


def test_auto_takes_int4_where_int8_is_large_for_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path)
    monkeypatch.setattr(install, "free_bytes", lambda: 1000)
    device.deliver(offer_of(device, 1, 0.0))
    assert (device.state / "models/current/weights-int4.safetensors").is_file()


def add_noise(state: AdapterState, version: int) -> AdapterState:
    """The state with noise on every tensor."""
    generator = torch.Generator().manual_seed(version)
    return state.replace({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.tensors.items()}, version=version)


def live_answer(device: Device, adapter: AdapterState, shifts: list[AdapterState], prompt: str) -> str:
    """The greedy answer of the training side's model."""
    space = Workspace(device.config)
    space.rebase(tuple(s.spec.version for s in shifts), shifts)
    space.slot(adapter).load(adapter)
    ids = space.backbone.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        made = space.live.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    return space.backbone.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3", "full", "ravan", "fedsb", "adapter", "prompt", "prefix", "ptuning_v2"])
def test_each_method_s_model_answers_as_the_training_side_does(tmp_path: Path, method: str) -> None:
    device = Device(tmp_path, {"peft": PeftConfig(method=method, rank=2, tokens=3, bottleneck=3)}, package="stored")
    adapter = add_noise(device.initial, 1)
    shifts = [add_noise(device.initial, v) for v in (1, 2)] if method == "lora" else []
    assert device.deliver(prepare(device.server, 2, adapter.replace(version=2), shifts)).state == "installed"
    answer = generate_text(device.state / "models/current", "lamp door", max_new_tokens=8)
    assert answer.split() == live_answer(device, adapter, shifts, "lamp door").split() and answer


def test_a_classifier_is_installed_as_a_folder_of_transformers(tmp_path: Path) -> None:
    device = Device(tmp_path, {"task": TaskConfig(kind="classification", max_length=16)})
    assert device.deliver(prepare(device.server, 1, add_noise(device.initial, 1))).state == "installed"
    model = AutoModelForSequenceClassification.from_pretrained(device.state / "models/current")
    assert list(model.config.label2id) == LABELS


def test_another_method_s_adapter_is_refused(tmp_path: Path) -> None:
    device = Device(tmp_path)
    other = device.adapter(1).replace(method="ia3")
    with pytest.raises(AssertionError, match="the model's adapter is not the lora adapter of this experiment"):
        device.deliver(prepare(device.server, 1, other))


def test_an_invalid_delivery_gives_a_one_sentence_error(tmp_path: Path) -> None:
    device = Device(tmp_path)
    offer = offer_of(device, 1, 0.0)
    good = dict(offer.message(0).config_records)
    for changed, sentence in (
        ({}, "the server's delivery lacks 'manifest'"),
        ({"manifest": ConfigRecord({"text": "x"})}, "the server's delivery lacks 'signature'"),
        ({"manifest": ConfigRecord({"text": 5, "signature": b""})}, "the server's delivery has a field of another type"),
        ({**good, "part": ConfigRecord({"offset": 0})}, "the server's delivery lacks 'data'"),
        ({**good, "part": ConfigRecord({"offset": 0, "data": "text"})}, "the server's delivery has a field of another type"),
    ):
        with pytest.raises(AssertionError, match=sentence):
            device.ask("query.deliver", changed)

"""Installs a delivered model on a device: compares it with the present model, builds a package, and makes it the current version.

    STATE/models/versions/NAME/model/        the package, or a Hugging Face folder where the engine does not support the model
    STATE/models/versions/NAME/source/       the run's settings and the chosen adapter, from which the package was built
    STATE/models/versions/NAME/record.json   what was compared, and what was chosen
    STATE/models/current                     symbolic link to the model in use

Each step can be interrupted and repeated: a version appears complete, then `current` changes to it, then the download is deleted.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Message, RecordDict

from fedtune.clients.deployed import Device
from fedtune.clients.devices.measure import free_bytes
from fedtune.clients.host import ClientHost
from fedtune.clients.turns import make
from fedtune.config import Config, to_dict
from fedtune.config.stored import read_config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.delivery import DeliveryState, Manifest
from fedtune.contracts.privacy_terms import terms
from fedtune.contracts.task import task_of
from fedtune.contracts.wire import ServerMessage
from fedtune.delivery.download import Downloads
from fedtune.delivery.versions import Versions
from fedtune.errors import ConfigError, Decline, FedtuneError, ModelError, PlanError
from fedtune.export.edge import export_edge
from fedtune.export.huggingface import export_hf
from fedtune.models.adapter_folder import read_adapter
from fedtune.models.checkpoint import stored_tensors
from fedtune.storage.atomic import new_folder

KEPT = 3  # versions kept on the device
_SHARE = 4  # a package in int8 may take one part in _SHARE of the device's memory, else it is int4


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """An adapter that the device may use.

    Args:
        kind: `global` or `personal`.
        adapter: All its tensors.
        score: The task's primary metric on the device's held-out rows; None without such rows.
    """

    kind: str
    adapter: AdapterState
    score: float | None


class Installer:
    """Answers the messages of a delivery on one device."""

    def __init__(self, device: Device) -> None:
        self._device, self._downloads, self._versions = device, Downloads(device), Versions(device.state)

    def __call__(self, host: ClientHost, message: Message) -> Message:
        """Store the message's part; after the last one, install the model.

        Raises:
            Decline: The device does not accept the model.
            FedtuneError: The download or the installation failed; the server may send the model again.
        """
        records = message.content.config_records
        try:
            text, signature = records["manifest"]["text"], records["manifest"]["signature"]
            part = records.get("part")
            offset, data = (part["offset"], part["data"]) if part is not None else (0, b"")
        except KeyError as bad:
            raise PlanError(f"the server's delivery lacks {bad}: the peers run different versions of fedtune") from None
        if not (isinstance(text, str) and isinstance(signature, bytes) and isinstance(offset, int) and isinstance(data, bytes)):
            raise PlanError("the server's delivery has a field of another type: the peers run different versions of fedtune")
        manifest = self._downloads.accept(text, signature, host)
        state = self._installed(manifest)
        if state is None:
            have = self._downloads.add(manifest, offset, data)
            state = self._install(manifest, host) if have == manifest.bytes else DeliveryState(state="wants", have=have)
        if state.state != "wants" and (self._device.min_privacy is not None or terms(host.config)["privacy"] == "record"):
            state = DeliveryState(state="done")  # what it chose depends on its rows
        return Message(RecordDict({"delivery": state.to_record()}), reply_to=message)

    def _installed(self, manifest: Manifest) -> DeliveryState | None:
        """The state if this model is installed already, perhaps by a process that was killed before it could answer."""
        found = next((v for v in self._versions.names() if v.name == manifest.name), None)
        if found is None:
            return None
        if self._downloads.have(manifest):  # else the owner may have gone back to an older version, which stays current
            self._versions.activate(found.name)
            self._downloads.discard(manifest)
        return DeliveryState(state="installed", chosen=found.record.chosen if found.record else "")

    def _newest(self) -> float:
        """When the newest version was installed, in seconds since 1970; 0 if there is none."""
        return max((v.record.installed for v in self._versions.names() if v.record), default=0.0)

    def _install(self, manifest: Manifest, host: ClientHost) -> DeliveryState:
        request = self._downloads.read(manifest)
        spec, names = request.adapter.spec, host.space.initial.tensors
        if spec.method != host.config.peft.method or not request.adapter.tensors.keys() <= names.keys():
            raise Decline("model", f"the model's adapter is not the {host.config.peft.method} adapter of this experiment")
        old = self._old_score(host)
        candidates = _candidates(host, self._device.client, request)
        metric, higher = task_of(host.config.task).primary
        best = candidates[0]
        for other in candidates[1:]:
            if other.score is not None and best.score is not None and (other.score > best.score if higher else other.score < best.score):
                best = other
        scores = {"old": old, **{c.kind: c.score for c in candidates}}
        if old is not None and best.score is not None and (old > best.score if higher else old < best.score):
            self._downloads.discard(manifest)
            return DeliveryState(state="kept")
        path = self._device.state / "models" / "versions" / manifest.name
        with _disk_errors(path), _new_version(path) as folder:
            note = self._build(folder, host, request, best.adapter)
            record = {
                "run": manifest.run,
                "round": manifest.round,
                "chosen": best.kind,
                "metric": metric if best.score is not None else None,
                "scores": scores,
                "installed": max(time.time(), self._newest() + 1e-3),  # versions are ordered by it, also if the clock was set back
                "bytes": sum(f.stat().st_size for f in (folder / "model").rglob("*") if f.is_file()),
                "note": note,
            }
            (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self._versions.activate(manifest.name)
        self._versions.prune(KEPT)
        self._downloads.discard(manifest)
        return DeliveryState(state="installed", chosen=best.kind)  # pyright: ignore[reportArgumentType]

    def _build(self, folder: Path, host: ClientHost, request: ServerMessage, adapter: AdapterState) -> str:
        """Write the version's source, and the package made from it. Returns why it is no edge package; "" if it is one."""
        source, model = folder / "source", host.loaded_model(self._device.client)
        (source / "adapter").mkdir(parents=True)
        text = yaml.safe_dump(to_dict(host.config), sort_keys=False, allow_unicode=True)
        (source / "config.yaml").write_text(text, encoding="utf-8")
        (source / "partition.json").write_text(json.dumps({"labels": list(host.space.federation.labels)}), encoding="utf-8")
        model.save(source / "adapter", adapter, request.shifts)
        if not task_of(host.config.task).gives_text:
            export_hf(source, folder / "model")
            return "the model generates no text"
        try:
            export_edge(source, folder / "model", quantize=self._quantize(host))
        except ModelError as bad:  # the engine does not support this model: transformers runs it
            export_hf(source, folder / "model")
            return str(bad)
        return ""

    def _quantize(self, host: ClientHost) -> str | None:
        if self._device.package != "auto":
            return None if self._device.package == "stored" else self._device.package
        weights = sum(math.prod(t.shape) for t in stored_tensors(host.space.backbone.folder))
        own = None if host.device is None else host.device.memory_mb
        return "int8" if _SHARE * weights <= (own * 1e6 if own else free_bytes()) else "int4"

    def _old_score(self, host: ClientHost) -> float | None:
        """The present model's score on the device's held-out rows; None if there are no rows, or it cannot be compared."""
        rows = host.space.examples(self._device.client, "held_out")
        if not rows or (name := self._versions.current()) is None:
            return None
        source = self._versions.model(name).with_name("source")
        try:
            config, adapter = read_config(source), read_adapter(source / "adapter")
        except FedtuneError:
            return None
        if not _comparable(config, host.config):
            return None
        model = host.loaded_model(self._device.client)
        model.rebase(tuple(s.spec.version for s in adapter.shifts), adapter.shifts)
        return model.score(adapter.state, rows)[0].get(task_of(host.config.task).primary[0])


def _candidates(host: ClientHost, client: str, request: ServerMessage) -> list[_Candidate]:
    """The delivered model, before it the client's personal one if the method has one; scored on the client's held-out rows."""
    model, rows = host.loaded_model(client), host.space.examples(client, "held_out")
    model.rebase(request.base, request.shifts)
    turn, found = make(request.turn, request.params), list[tuple[str, AdapterState]]()
    store, before = host.storage.store, request.round + 1
    own = store.read(client, before) if request.keep else None
    of_turn = store.substore(f"turn-{request.turn}").read(client, before) if turn.is_personal() else None
    if own is not None or of_turn is not None:  # a client that took no turn has no personal model
        found.append(("personal", turn.personal(host.complete(client, request), of_turn)))
    shared = {n: request.adapter.tensors.get(n, t) for n, t in host.space.initial.tensors.items()}
    found.append(("global", request.adapter.replace(shared)))
    metric = task_of(host.config.task).primary[0]
    return [_Candidate(kind=k, adapter=a, score=model.score(a, rows)[0].get(metric) if rows else None) for k, a in found]


def _comparable(old: Config, new: Config) -> bool:
    """Whether both adapters fit the same loaded model and are scored alike."""

    def parts(config: Config) -> list[dict[str, Any]]:
        method = dataclasses.replace(config.peft, from_=None)  # where the run began does not matter
        return [dataclasses.asdict(part) for part in (config.model, config.task, method)]

    return parts(old) == parts(new)


@contextlib.contextmanager
def _new_version(path: Path) -> Iterator[Path]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with new_folder(path) as folder:
        yield folder


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as bad:
        raise ConfigError(f"cannot install the model in {path}: {bad.strerror or bad}; free the disk or give another --state") from None


__all__ = ["KEPT", "Installer"]

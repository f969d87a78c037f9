"""The run directory: made exclusively, checkpointed after every round, resumable from the newest good checkpoint.

outputs/<name>/<date-time>-<id>/
    config.yaml  partition.json  metrics.jsonl  answers.json  report.html  tensorboard/
    checkpoints/round-0007/{adapter.safetensors, memory.safetensors, checkpoint.json}; late.safetensors where late replies wait,
                 exchange.safetensors where the exchange keeps something
    shifts/      what was merged into the frozen weights, a file a round; checkpoints name those that they need
    clients/     what simulated clients keep between their turns
    adapter/     what PeftModel.from_pretrained opens
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtune.config import Config, to_dict
from fedtune.config.stored import read_config
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.plan import LateUpdate, Update
from fedtune.contracts.strategy import ServerState
from fedtune.errors import CheckpointError, ConfigError, RunError
from fedtune.storage.atomic import new_file, new_folder, write_text
from fedtune.storage.parsing import parse_json, read_text
from fedtune.storage.reading import read_fields

_FORMAT = 2
_LATE = "late.safetensors"
_EXCHANGE = "exchange.safetensors"
_OLD_CLIP = "privacy.clip"  # where version 0.1 kept the clip norm of privacy=user
_BEGINNING = {".lock", "checkpoints", ".config.yaml.tmp", "lost+found"}  # what a start leaves that ends before the config is stored


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that the next round needs.

    Args:
        round: The round that ended; 0 is before the first.
        state: The strategy's state.
        clients: Logical id → what the server keeps of it: rounds counted, rounds dropped and why.
        late: Updates that wait for a later round.
    """

    round: int
    state: ServerState
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    late: tuple[LateUpdate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """What checkpoint.json holds of an update that waits."""

    due: int
    update: str


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """checkpoint.json: the checksum of each file by its path, and what lies in no other file."""

    round: int
    sha256: Mapping[str, str]
    clients: Mapping[str, Mapping[str, Any]]
    shifts: tuple[int, ...]
    late: tuple[_Waiting, ...] = ()


class RunDirectory:
    """One run on disk. Holds a lock while it is open: two processes never write the same run."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self._kept: dict[Path, str] = {}
        try:
            self._lock = open(path / ".lock", "w")  # noqa: SIM115  held as long as the run is
        except OSError as bad:
            raise RunError(f"cannot open the run {path}: {bad.strerror}; make the run's folder writable") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(f"run {path} is in use by another process: wait for it or stop it first") from None

    @classmethod
    def create(cls, config: Config, path: Path | None = None) -> "RunDirectory":
        """Make a directory for a new run (at `path`, or under a name of its own) and store its config.

        The config comes last and whole: what a start left that was killed before it holds nothing and is used again, as is an empty folder.

        Raises:
            RunError: Another process has it open, there is a run in it or something else, or it cannot be written.
        """
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = path or Path(config.output_dir) / config.name / f"{stamp}-{secrets.token_hex(3)}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)  # with the lock: of two that begin at once one makes the run
            try:
                run._begin()
            except BaseException:
                run.close()
                raise
        except OSError as bad:
            raise RunError(
                f"cannot make the run directory {path}: {bad.strerror}; free the disk, or set output_dir to a folder that can be"
                " written (of a server: --run)"
            ) from None
        return run

    def _begin(self) -> None:
        """Store the config, where nothing but an unfinished start lies here."""
        if (self.path / "config.yaml").exists():
            raise RunError(f"there is a run in {self.path} already: go on with resume={self.path}, or give another folder")
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        if others := sorted(p.name for p in (*self.path.iterdir(), *folder.iterdir()) if p.name not in _BEGINNING):
            raise RunError(f"{self.path} holds {others[0]} and no run (no config.yaml): give an empty folder or a new one")
        self._write_config()

    def _write_config(self) -> None:
        write_text(self.path / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True))

    @classmethod
    def open(cls, path: Path, *, rounds: int | None = None) -> "RunDirectory":
        """Open a run to go on with it, by its own config; only `rounds` may differ.

        Raises:
            CheckpointError: No run there, or its config cannot be read.
            ConfigError: More rounds are done already.
            RunError: Another process has it open, or it cannot be written.
        """
        config = read_config(path)
        if rounds is None:
            return cls(path, config)
        config = dataclasses.replace(config, rounds=rounds)
        run = cls(path, config)  # first the lock: another process may be writing this run
        if (found := run.newest()[0]) and found.round > rounds:  # before it is written: the advice is to leave it out
            run.close()
            raise ConfigError(f"rounds={rounds} is less than the {found.round} rounds that {path} has done: leave it out or ask for more")
        try:
            run._write_config()
        except OSError as bad:
            run.close()
            raise RunError(f"cannot write {path / 'config.yaml'}: {bad.strerror}; make the run's folder writable") from None
        return run

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint beside its place, flush it, and rename it in: a kill leaves the last good one."""
        target = self.path / "checkpoints" / f"round-{checkpoint.round:04d}"
        try:
            with new_folder(target, replace=True) as folder:  # a damaged one that the resume skipped is replaced
                checkpoint.state.adapter.save(folder / "adapter.safetensors")
                save_file(dict(checkpoint.state.memory), folder / "memory.safetensors")
                if checkpoint.state.exchange:
                    save_file(dict(checkpoint.state.exchange), folder / _EXCHANGE)
                if checkpoint.late:
                    save_file(_tensors_of(checkpoint.late), folder / _LATE)
                sums = {f.name: _sha256(f) for f in sorted(folder.iterdir())}
                sums |= {f"../../shifts/{_shift_file(s)}": self._keep(s) for s in checkpoint.state.shifts}
                body = {"format": _FORMAT, "round": checkpoint.round, "sha256": sums, "clients": checkpoint.clients}
                body["shifts"] = [s.spec.version for s in checkpoint.state.shifts]
                if checkpoint.late:
                    body["late"] = [{"due": one.due, "update": one.update.to_json()} for one in checkpoint.late]
                (folder / "checkpoint.json").write_text(json.dumps(body), encoding="utf-8")
        except OSError as bad:
            raise RunError(
                f"cannot write the checkpoint {target}: {bad.strerror}; free the disk and resume with resume={self.path}"
            ) from None
        for old in self._checkpoints()[self.config.keep_checkpoints :]:
            shutil.rmtree(old, ignore_errors=True)

    def _keep(self, shift: AdapterState) -> str:
        """Write a shift to its file, if this process has not yet, and return its checksum."""
        path = self.path / "shifts" / _shift_file(shift)
        if path not in self._kept:
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as beside:
                shift.save(beside)
            self._kept[path] = _sha256(path)
        return self._kept[path]

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest good checkpoint (None where there is none yet), and a sentence for each damaged one that was passed over."""
        skipped = []
        for path in self._checkpoints():
            try:
                return read_checkpoint(path), skipped
            except CheckpointError as bad:
                skipped.append(str(bad))
        return None, skipped

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file of the run whole or not at all."""
        write_text(self.path / name, json.dumps(value))

    def close(self) -> None:
        self._lock.close()

    def _checkpoints(self) -> list[Path]:
        found = (p for p in (self.path / "checkpoints").glob("round-*") if re.fullmatch(r"round-\d{4,}", p.name))
        return sorted(found, key=lambda p: int(p.name[6:]), reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CheckpointError: It is not whole, or not one of ours.
    """
    try:
        body = parse_json(read_text(path / "checkpoint.json"))
        if body["format"] != _FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {body['format']}, this fedtune reads {_FORMAT}: use the version that wrote it"
            )
        saved = _Saved(**read_fields(_Saved, body, ValueError, "checkpoint", others=True))
        for name, wanted in saved.sha256.items():
            if _sha256(path / name) != wanted:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")
        memory: dict[str, torch.Tensor] = load_file(path / "memory.safetensors")
        exchange = load_file(path / _EXCHANGE) if _EXCHANGE in saved.sha256 else {}
        if _OLD_CLIP in memory:
            exchange = {"clip": memory.pop(_OLD_CLIP)}
        adapter = AdapterState.load(path / "adapter.safetensors")
        files = [path.parent.parent / "shifts" / f"{version:04d}.safetensors" for version in saved.shifts]
        state = ServerState(adapter=adapter, memory=memory, exchange=exchange, shifts=tuple(map(AdapterState.load, files)))
        late = _read_late(path, saved.late, adapter) if saved.late else ()
        return Checkpoint(round=saved.round, state=state, clients=saved.clients, late=late)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as bad:
        raise CheckpointError(f"checkpoint {path} is damaged: {type(bad).__name__} {str(bad)[:80]}") from None


def _tensors_of(late: tuple[LateUpdate, ...]) -> dict[str, torch.Tensor]:
    return {f"{i}/{name}": tensor.contiguous() for i, one in enumerate(late) for name, tensor in one.update.adapter.tensors.items()}


def _read_late(path: Path, waiting: tuple[_Waiting, ...], adapter: AdapterState) -> tuple[LateUpdate, ...]:
    found = load_file(path / _LATE)
    each = [{n: found[f"{i}/{n}"] for n in adapter.tensors if f"{i}/{n}" in found} for i in range(len(waiting))]
    updates = [Update.from_json(one.update, adapter.replace(tensors)) for one, tensors in zip(waiting, each, strict=True)]
    return tuple(LateUpdate(update=update, due=one.due) for one, update in zip(waiting, updates, strict=True))


def _shift_file(shift: AdapterState) -> str:
    return f"{shift.spec.version:04d}.safetensors"


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

"""The run directory: created exclusively, checkpointed after every round, resumable from the newest good checkpoint.

outputs/<name>/<date-time>-<id>/
    config.yaml  partition.json  metrics.jsonl  answers.json  report.html  tensorboard/
    checkpoints/round-0007/{adapter.safetensors, memory.safetensors, checkpoint.json}; late.safetensors if there are late updates,
                 exchange.safetensors if the exchange has state
    shifts/      shifts merged into the frozen weights, one file per round; checkpoints name those that they need
    clients/     state of simulated clients between their turns
    start/       what a warm start began with
    adapter/     adapter folder for PeftModel.from_pretrained
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
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
_OLD_CLIP = "privacy.clip"  # in memory.safetensors of version 0.1: the clip norm of privacy=user
# files of a start that was stopped before the config was written
_BEGINNING = {".lock", "checkpoints", "start", ".start.tmp", ".config.yaml.tmp", "lost+found"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that the next round needs.

    Args:
        round: The finished round; 0 is before the first.
        state: The state after the round.
        clients: Logical id → the server's record of the client: counted and dropped rounds, last result.
        late: Late updates that may count in a later round.
    """

    round: int
    state: ServerState
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    late: tuple[LateUpdate, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A late update in checkpoint.json."""

    due: int
    update: str


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """checkpoint.json: the checksum of each file by path, and all data that is in no other file."""

    round: int
    sha256: Mapping[str, str]
    clients: Mapping[str, Mapping[str, Any]]
    shifts: tuple[int, ...]
    late: tuple[_Waiting, ...] = ()


class RunDirectory:
    """One run on disk. It is locked while open, so that two processes never write the same run."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self._kept: dict[Path, str] = {}
        try:
            self._lock = open(path / ".lock", "w")  # noqa: SIM115  stays open as long as the run
        except OSError as bad:
            raise RunError(f"cannot open the run {path}: {bad.strerror}; make the run's folder writable") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunError(f"run {path} is in use by another process: wait for it or stop it first") from None

    @classmethod
    def create(cls, config: Config, path: Path | None = None, write: Callable[[Path], None] | None = None) -> "RunDirectory":
        """Create the directory of a new run (at `path`, or under a generated name) and store its config.

        `write` stores what the run needs from the start in its folder `start/`, before the config.

        The config is written last and atomically. A directory of a start that was killed before that is empty of results and is used again,
        as is an empty folder.

        Raises:
            RunError: Another process has the directory open, it is not empty, or it cannot be written.
        """
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = path or Path(config.output_dir) / config.name / f"{stamp}-{secrets.token_hex(3)}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)  # takes the lock: of two processes that start at once, one creates the run
            try:
                run._begin(write)
            except BaseException:
                run.close()
                raise
        except OSError as bad:
            raise RunError(
                f"cannot create the run directory {path}: {bad.strerror}; free disk space, or set output_dir (of a server: --run) to a"
                " writable folder"
            ) from None
        return run

    def _begin(self, write: Callable[[Path], None] | None) -> None:
        """Store the config, if the directory has nothing but files of an unfinished start."""
        if (self.path / "config.yaml").exists():
            raise RunError(f"there is a run in {self.path} already: continue it with resume={self.path}, or give another folder")
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        if others := sorted(p.name for p in (*self.path.iterdir(), *folder.iterdir()) if p.name not in _BEGINNING):
            raise RunError(f"{self.path} contains {others[0]} but no run (no config.yaml): give an empty folder or a new one")
        if write is not None:
            write(self.path)
        self._write_config()

    def _write_config(self) -> None:
        write_text(self.path / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True))

    @classmethod
    def open(cls, path: Path, *, rounds: int | None = None) -> "RunDirectory":
        """Open a run to resume it with its own config; only `rounds` may differ.

        Raises:
            CheckpointError: There is no run, or its config cannot be read.
            ConfigError: The run has done more rounds already.
            RunError: Another process has it open, or it cannot be written.
        """
        config = read_config(path)
        if rounds is None:
            return cls(path, config)
        config = dataclasses.replace(config, rounds=rounds)
        run = cls(path, config)  # takes the lock first: another process may be writing this run
        if (found := run.newest()[0]) and found.round > rounds:  # check before config.yaml changes
            run.close()
            raise ConfigError(f"rounds={rounds} is less than the {found.round} rounds that {path} has done: leave it out or raise it")
        try:
            run._write_config()
        except OSError as bad:
            run.close()
            raise RunError(f"cannot write {path / 'config.yaml'}: {bad.strerror}; make the run's folder writable") from None
        return run

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint to a temporary folder, flush it, and rename it: a kill leaves the previous checkpoint intact."""
        target = self.path / "checkpoints" / f"round-{checkpoint.round:04d}"
        try:
            with new_folder(target, replace=True) as folder:  # replaces a damaged one that resuming skipped
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
                f"cannot write the checkpoint {target}: {bad.strerror}; free disk space and continue with resume={self.path}"
            ) from None
        for old in self._checkpoints()[self.config.keep_checkpoints :]:
            shutil.rmtree(old, ignore_errors=True)

    def _keep(self, shift: AdapterState) -> str:
        """Write a shift to its file, once per process, and return its checksum."""
        path = self.path / "shifts" / _shift_file(shift)
        if path not in self._kept:
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as beside:
                shift.save(beside)
            self._kept[path] = _sha256(path)
        return self._kept[path]

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest good checkpoint (None if there is none), and a sentence for each damaged one that was skipped."""
        skipped = []
        for path in self._checkpoints():
            try:
                return read_checkpoint(path), skipped
            except CheckpointError as bad:
                skipped.append(str(bad))
        return None, skipped

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file of the run atomically."""
        write_text(self.path / name, json.dumps(value))

    def close(self) -> None:
        self._lock.close()

    def _checkpoints(self) -> list[Path]:
        found = (p for p in (self.path / "checkpoints").glob("round-*") if re.fullmatch(r"round-\d{4,}", p.name))
        return sorted(found, key=lambda p: int(p.name[6:]), reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        CheckpointError: It is incomplete, damaged, or of another format.
    """
    try:
        body = parse_json(read_text(path / "checkpoint.json"))
        if body["format"] != _FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {body['format']}, but this version reads {_FORMAT}: use the version that wrote it"
            )
        saved = _Saved(**read_fields(_Saved, body, ValueError, "checkpoint", others=True))
        for name, wanted in saved.sha256.items():
            if _sha256(path / name) != wanted:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} has another checksum")
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

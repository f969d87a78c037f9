"""The versions of the delivered model on a device.

STATE/models/versions/NAME/model/       a complete model folder, as `fedtune serve` opens it
STATE/models/versions/NAME/record.json  where it comes from, and its scores
STATE/models/current                    symbolic link to versions/NAME/model; absent before the first model

The link is replaced atomically, so a kill at any instant leaves the old or the new version current, and each version whole or gone. Changes
are made under a lock on STATE/models; reads need none. A reader that has found a version may find it removed a moment later.
"""

import fcntl
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.config.bounds import require
from fedtune.errors import CheckpointError
from fedtune.storage.atomic import remove_folder, remove_leftovers, write_link
from fedtune.storage.ids import shown
from fedtune.storage.parsing import parse_json, read_text
from fedtune.storage.reading import read_fields

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,239}", re.ASCII)  # with the ends of hidden names it is shorter than 255 bytes


@dataclass(frozen=True, kw_only=True)
class Record:
    """record.json of a version.

    Args:
        run: Name of the run that trained it.
        round: The run's round.
        chosen: Whether it is the global model or this device's personal one.
        metric: Metric of the scores; None if nothing was measured.
        scores: Score on this device's held-out rows of the `old`, `global` and `personal` model; None where there is none.
        installed: Seconds since 1970.
        bytes: Size of the model folder.
    """

    run: str
    round: int
    chosen: Literal["global", "personal"]
    metric: str | None
    scores: Mapping[str, float | None]
    installed: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version. `record` is None if record.json is missing or damaged; `flaw` is then the sentence that says so."""

    name: str
    record: Record | None
    flaw: str = ""


class Versions:
    """The versions in a client's state folder, which may have none yet."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "models"
        self._versions, self._link = self.folder / "versions", self.folder / "current"
        self._mine, self._depth = threading.RLock(), 0

    def model(self, name: str) -> Path:
        """The model folder of a version. Raises CheckpointError if there is no such version."""
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"'{shown(name)}' is not the name of a version: give one that `fedtune model list` shows")
        folder = self._versions / name / "model"
        if folder.parent.is_symlink() or not folder.is_dir():
            raise CheckpointError(f"there is no version {name} in {self._versions}: give one that `fedtune model list` shows")
        return folder

    def current(self) -> str | None:
        """The name of the current version; None before the first.

        Raises:
            CheckpointError: The link was made by hand, or its version was removed by hand.
        """
        try:
            target = os.readlink(self._link)
        except FileNotFoundError:
            return None
        except OSError as bad:
            if self._link.exists():
                raise CheckpointError(f"{self._link} is not a symbolic link: remove it") from None
            raise CheckpointError(f"cannot read {self._link}: {bad.strerror}") from None
        match target.split("/"):
            case ["versions", name, "model"] if _NAME.fullmatch(name) and self._is_whole(name):
                return name
        raise CheckpointError(f"{self._link} points to '{shown(target)}', which is no version: remove this link")

    def names(self) -> list[Version]:
        """The versions, newest first. Files, hidden folders and folders without a model are left out.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        try:
            found = [path.name for path in self._versions.iterdir() if _NAME.fullmatch(path.name) and self._is_whole(path.name)]
        except FileNotFoundError:
            return []
        except OSError as bad:
            raise CheckpointError(f"cannot read {self._versions}: {bad.strerror}") from None
        return sorted(map(self._read, found), key=self._age, reverse=True)

    def activate(self, name: str) -> None:
        """Make a version current.

        Raises:
            CheckpointError: There is no such version, or the link cannot be written.
        """
        with self.locked():
            self.model(name)
            write_link(self._link, Path("versions", name, "model"))

    def rollback(self) -> str:
        """Make the version current that was installed before the current one, or the newest if none is current; returns its name.

        Raises:
            CheckpointError: There is none, or the link is invalid or cannot be written.
        """
        with self.locked():
            names, current = [version.name for version in self.names()], self.current()
            older = names if current is None else names[names.index(current) + 1 :]
            if not older:
                why = f"{current} is the oldest version there" if current else "no model has been installed there"
                raise CheckpointError(f"cannot go back to an earlier model in {self.folder}: {why}")
            self.activate(older[0])
            return older[0]

    def remove(self, name: str) -> None:
        """Remove a version.

        Raises:
            CheckpointError: There is no such version, it is the current one, or it cannot be removed.
        """
        with self.locked():
            self.model(name)
            if name == self.current():
                raise CheckpointError(
                    f"version {name} is current: go back to an earlier one with `fedtune model rollback`, or remove all of them with --all"
                )
            remove_folder(self._versions / name)

    def prune(self, keep: int) -> list[str]:
        """Remove all versions but the newest `keep` and the current one; returns the names of the removed ones.

        Raises:
            CheckpointError: The link is invalid, or a version cannot be removed.
        """
        require("keep", keep, ge=0)
        with self.locked():
            current = self.current()
            names = [version.name for version in self.names()[keep:] if version.name != current]
            for name in names:
                remove_folder(self._versions / name)
            return names

    def clear(self) -> list[str]:
        """Remove all versions, the current one too; returns their names.

        Raises:
            CheckpointError: The link or a version cannot be removed.
        """
        with self.locked():
            self._link.unlink(missing_ok=True)
            return self.prune(0)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes and threads from changing the versions; this thread may. First removes what killed removals have left.

        Raises:
            CheckpointError: The folder cannot be locked or changed.
        """
        with self._mine:
            self._depth += 1
            try:
                if self._depth > 1:
                    yield
                    return
                self._versions.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.folder, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    remove_leftovers(self._versions)
                    yield
                finally:
                    os.close(handle)
            except OSError as bad:
                raise CheckpointError(f"cannot change the models in {self.folder}: {bad.strerror or bad}") from None
            finally:
                self._depth -= 1

    def _is_whole(self, name: str) -> bool:
        return not (self._versions / name).is_symlink() and (self._versions / name / "model").is_dir()

    def _read(self, name: str) -> Version:
        path = self._versions / name / "record.json"
        try:
            fields = read_fields(Record, parse_json(read_text(path)), ValueError, "record", others=True)
            return Version(name=name, record=Record(**fields))
        except (OSError, ValueError) as bad:
            why = getattr(bad, "strerror", None) or str(bad)
            return Version(name=name, record=None, flaw=f"{path} is damaged ({why}): the run and the scores of {name} are unknown")

    def _age(self, version: Version) -> tuple[float, int, str]:
        """Sorts by time of installation: the record's, or the folder's if that is damaged."""
        if version.record is not None:
            return version.record.installed, version.record.round, version.name
        try:
            return (self._versions / version.name).stat().st_mtime, -1, version.name
        except OSError:  # removed a moment ago
            return 0.0, -1, version.name

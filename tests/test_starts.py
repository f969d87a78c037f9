"""A start can be repeated after the previous one was killed or met a full disk at any instant."""

import errno
import functools
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.clients.deployed import Device, _load_hello, _save_hello
from fedtune.config import Config
from fedtune.config.stored import read_config
from fedtune.errors import FedtuneError, RunError
from fedtune.network.database import is_whole, make_database
from fedtune.network.keys import make_keys, read_allowed
from fedtune.network.node import _identity
from fedtune.runs.directory import RunDirectory

Make = Callable[[Path], object]


class Killed(BaseException):
    """The process is killed: none of its later cleanup reaches the disk."""


class Disk:
    """Counts file operations under a folder, and stops all of them after a given number."""

    def __init__(self) -> None:
        self.folder, self.left, self.stop = "", 0, Exception

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename") or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        removes = event in ("os.remove", "os.rmdir") and self.stop is Killed  # a full disk still allows deletions
        if (
            self.folder and (writes or removes) and (isinstance(args[0], int) or str(args[0]).startswith(self.folder))
        ):  # int: a descriptor that is already open
            self.left -= 1
            if self.left < 0:
                raise Killed if self.stop is Killed else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @functools.cache  # noqa: B019  there is one disk
    def listen(self) -> None:
        sys.addaudithook(self)  # added late, because Python cannot remove an audit hook and calls it in all later tests

    def stops(self, make: Make, folder: Path, operations: int, stop: type[BaseException]) -> bool:
        """Whether `make` was stopped before this operation; False if it has fewer. On a full disk it must raise a FedtuneError."""
        self.listen()
        self.folder, self.left, self.stop = str(folder), operations, stop
        try:
            make(folder)
        except (Killed, FedtuneError):
            return True
        finally:
            self.folder = ""
        return False


DISK = Disk()


def run_in(folder: Path) -> None:
    RunDirectory.create(Config(), folder / "run").close()


STARTS: dict[str, tuple[Make, Make]] = {
    "run": (run_in, lambda folder: read_config(folder / "run")),
    "run in an empty folder": (lambda folder: RunDirectory.create(Config(), folder).close(), read_config),
    "node key": (lambda folder: _identity(folder / "node.key", True), lambda folder: _identity(folder / "node.key", False)),
    "keys": (lambda folder: make_keys(folder / "keys", ["host"], ["anna"]), lambda folder: read_allowed(folder / "keys/allowed.json")),
    "hello": (
        lambda folder: _save_hello(Device(client="a", state=folder), "{}"),
        lambda folder: _load_hello(Device(client="a", state=folder)),
    ),
}


@pytest.mark.parametrize("stop", [Killed, OSError], ids=["killed", "disk full"])
@pytest.mark.parametrize("what", STARTS)
def test_a_start_is_repeatable(tmp_path: Path, what: str, stop: type[BaseException]) -> None:
    make, use = STARTS[what]
    operations = 0
    while True:
        (folder := tmp_path / str(operations)).mkdir()
        if not DISK.stops(make, folder, operations, stop):
            break
        try:
            use(folder)  # it was stopped after the decisive step, so its result is complete
        except FedtuneError:
            make(folder)
        use(folder)
        operations += 1
    assert operations >= 2


def test_a_non_empty_folder_is_not_accepted_as_a_run(tmp_path: Path) -> None:
    RunDirectory.create(Config(), tmp_path / "run").close()
    with pytest.raises(RunError, match="there is a run in .* already: continue it with resume="):
        RunDirectory.create(Config(), tmp_path / "run")
    for stranger in ("notes.txt", "checkpoints/round-0001"):
        folder = tmp_path / stranger.replace("/", "-")
        (folder / stranger).mkdir(parents=True)
        with pytest.raises(RunError, match=f"contains {Path(stranger).name} but no run"):
            RunDirectory.create(Config(), folder)
        assert (folder / stranger).is_dir() and not (folder / "config.yaml").exists()


# -- the SuperLink's database -------------------------------------------------------------------------------------------------------------


def half(path: Path) -> None:
    """The database of a server that was killed during Flower's migrations."""
    with sqlite3.connect(path) as opened:
        opened.execute("CREATE TABLE node (node_id INTEGER)")
        opened.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")


@pytest.mark.slow
@pytest.mark.parametrize("left", ["half", "no database", "half beside"])
def test_an_incomplete_database_is_created_again(tmp_path: Path, left: str) -> None:
    path = tmp_path / "superlink.db"
    if left == "no database":
        path.write_bytes(b"SQL" * 100)
    else:
        half(path if left == "half" else path.with_name(".superlink.db.tmp"))
    make_database(path, 1.0)
    assert is_whole(path, 1.0) and list(tmp_path.iterdir()) == [path]
    before = path.stat().st_mtime_ns
    make_database(path, 1.0)
    assert path.stat().st_mtime_ns == before  # a complete database stays


def test_a_kill_during_the_migrations_leaves_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(engine: Any) -> None:
        half(Path(engine.url.database))
        raise KeyboardInterrupt

    monkeypatch.setattr("fedtune.network._flwr.run_migrations", kill)
    with pytest.raises(KeyboardInterrupt):
        make_database(tmp_path / "superlink.db", 1.0)
    assert not (tmp_path / "superlink.db").exists()

"""The versions on a device: what is current, what is removed, and what a kill leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedtune.delivery.versions import Versions
from fedtune.errors import CheckpointError
from fedtune.storage import atomic

RECORD: dict[str, Any] = {
    "run": "assistant", "round": 8, "chosen": "global", "metric": "loss", "scores": {"old": None, "global": 1.5, "personal": None},
    "installed": 100.0, "bytes": 10,
}  # fmt: skip


def install(state: Path, name: str, *, installed: float, **more: Any) -> None:
    folder = state / "models" / "versions" / name
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "record.json").write_text(json.dumps(RECORD | {"installed": installed, **more}))


@pytest.fixture
def three(tmp_path: Path) -> Versions:
    """Versions b, c and a, from old to new."""
    for at, name in enumerate("bca"):
        install(tmp_path, name, installed=100.0 + at)
    return Versions(tmp_path)


def names(versions: Versions) -> list[str]:
    return [version.name for version in versions.names()]


def test_a_device_without_a_model_has_no_versions(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    assert versions.current() is None and versions.names() == []
    with pytest.raises(CheckpointError, match=r"cannot go back to an earlier model in .*models: no model has been installed there$"):
        versions.rollback()
    assert versions.prune(3) == versions.clear() == []


def test_the_link_is_relative_and_names_the_current_version(three: Versions, tmp_path: Path) -> None:
    three.activate("c")
    assert os.readlink(tmp_path / "models" / "current") == "versions/c/model" and three.current() == "c"
    assert three.model("c").samefile(tmp_path / "models" / "current")
    moved = Versions(tmp_path.rename(tmp_path.with_name("moved")))
    assert moved.current() == "c" and names(moved) == ["a", "c", "b"]
    record = moved.names()[0].record
    assert record is not None and record.scores == {"old": None, "global": 1.5, "personal": None} and record.installed == 102


def test_rollback_goes_one_version_back_each_time(three: Versions) -> None:
    three.activate("a")
    assert [three.rollback(), three.rollback()] == ["c", "b"] and three.current() == "b"
    with pytest.raises(CheckpointError, match=r"b is the oldest version there"):
        three.rollback()
    (three.folder / "current").unlink()
    assert three.rollback() == three.current() == "a"  # without a current one: the newest


def test_the_current_version_stays(three: Versions) -> None:
    three.activate("b")
    with pytest.raises(CheckpointError, match=r"^version b is current: go back .* --all$"):
        three.remove("b")
    assert three.prune(1) == ["c"] and names(three) == ["a", "b"]
    three.remove("a")
    assert names(three) == ["b"] == three.clear() and three.current() is None
    assert list((three.folder / "versions").iterdir()) == []


def test_versions_of_the_same_second_are_ordered_by_round(tmp_path: Path) -> None:
    for name, number in (("x", 9), ("y", 10), ("z", 8)):
        install(tmp_path, name, installed=7, round=number)
    assert names(Versions(tmp_path)) == ["y", "x", "z"]


@pytest.mark.parametrize("name", ["../b", "b/../c", "", ".", "..", "/b", ".b.removed", "b\n", "é", "x" * 241])
def test_a_name_that_is_a_path_is_refused(three: Versions, name: str) -> None:
    for change in (three.activate, three.remove, three.model):
        with pytest.raises(CheckpointError, match="is not the name of a version: give one that `fedtune model list` shows"):
            change(name)
    assert names(three) == ["a", "c", "b"] and three.current() is None


def test_an_unknown_version_is_refused(three: Versions) -> None:
    three.activate("b")
    for change in (three.activate, three.remove):
        with pytest.raises(CheckpointError, match=r"^there is no version d in .*versions: give one that `fedtune model list` shows$"):
            change("d")
    assert three.current() == "b"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file or directory"),
        ("{", "Expecting property name"),
        ("[" * 99999, "nested too deeply"),
        ("[]", "the record must be a JSON object, got list"),
        (json.dumps(RECORD | {"round": "8"}), "the record's round is '8', which is not of type int"),
        (json.dumps(RECORD | {"chosen": "local"}), "the record's chosen is"),
        (json.dumps({"run": "a"}), "the record lacks the field 'round'"),
        (b"\xff", "codec can't decode"),
    ],
)
def test_a_damaged_record_gives_a_one_sentence_error(three: Versions, text: str | bytes | None, why: str) -> None:
    record = three.model("a").with_name("record.json")
    record.unlink()
    if text is not None:
        record.write_bytes(text.encode() if isinstance(text, str) else text)
    os.utime(record.parent, (0, 0))
    damaged = three.names()[-1]  # its folder's time
    assert damaged.name == "a" and damaged.record is None and "\n" not in damaged.flaw
    assert damaged.flaw.startswith(f"{record} is damaged (") and why in damaged.flaw
    three.activate("a")  # its model may be whole
    assert three.current() == "a"


def test_a_field_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    install(tmp_path, "a", installed=1, signer="x")
    assert Versions(tmp_path).names()[0].record is not None


def test_other_files_are_not_versions(three: Versions, tmp_path: Path) -> None:
    folder = three.folder / "versions"
    (folder / "note.txt").write_text("x")
    (folder / "empty").mkdir()
    (folder / ".d.tmp" / "model").mkdir(parents=True)  # an installation under way
    (folder / "link").symlink_to(folder / "a")
    (three.folder / "incoming").mkdir()
    assert names(three) == ["a", "c", "b"]
    for name in ("note.txt", "empty", "link"):
        with pytest.raises(CheckpointError, match="there is no version"):
            three.activate(name)
    three.clear()
    assert sorted(path.name for path in folder.iterdir()) == [".d.tmp", "empty", "link", "note.txt"]
    shutil.rmtree(folder)
    folder.write_text("x")
    with pytest.raises(CheckpointError, match=r"^cannot read .*versions: Not a directory$"):
        three.names()
    with pytest.raises(CheckpointError, match=r"^cannot change the models in .*: File exists$"):
        three.activate("a")


@pytest.mark.parametrize("target", ["versions/b", "versions/../model", "versions/gone/model", "/versions/b/model", "a\nb"])
def test_an_invalid_link_gives_a_one_sentence_error(three: Versions, target: str) -> None:
    link = three.folder / "current"
    link.symlink_to(target)
    for read in (three.current, three.rollback, lambda: three.prune(0), lambda: three.remove("b")):
        with pytest.raises(CheckpointError, match=r"^.*/current points to '.*', which is no version: remove this link$"):
            read()
    assert names(three) == ["a", "c", "b"]
    three.activate("b")
    assert three.current() == "b"


def test_a_folder_instead_of_the_link_gives_a_one_sentence_error(three: Versions) -> None:
    (three.folder / "current").mkdir()
    with pytest.raises(CheckpointError, match=r"^.*/current is not a symbolic link: remove it$"):
        three.current()
    with pytest.raises(CheckpointError, match=r"^cannot change the models in .*: Is a directory$"):
        three.activate("b")
    assert not (three.folder / ".current.tmp").is_symlink()


class Kill(BaseException):
    """Ends a call as a kill would: nothing is cleaned up by the product."""


def test_a_kill_leaves_a_version_complete_or_absent(three: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, **options: Any) -> None:
        if path.exists():
            (path / "model" / "config.json").unlink()
            raise Kill

    three.activate("a")
    monkeypatch.setattr(atomic.shutil, "rmtree", half)
    with pytest.raises(Kill):
        three.remove("b")
    monkeypatch.undo()
    assert names(three) == ["a", "c"] and (three.folder / "versions" / ".b.removed" / "model").is_dir()
    three.activate("c")  # the next change removes what is left
    assert sorted(path.name for path in (three.folder / "versions").iterdir()) == ["a", "c"]


def test_a_kill_before_the_swap_leaves_the_old_one(three: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*paths: Path) -> None:
        raise Kill

    three.activate("a")
    monkeypatch.setattr(atomic.os, "replace", kill)
    with pytest.raises(Kill):
        three.activate("b")
    monkeypatch.undo()
    assert three.current() == "a" and (three.folder / ".current.tmp").is_symlink()
    three.activate("b")
    assert three.current() == "b" and not (three.folder / ".current.tmp").is_symlink()


def test_the_swap_survives_a_power_failure(three: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, flush = list[Path](), atomic.flush
    monkeypatch.setattr(atomic, "flush", lambda path: (flushed.append(path), flush(path)))
    three.activate("a")
    three.remove("b")
    assert flushed == [three.folder, three.folder / "versions"]


def test_changes_wait_for_the_lock(three: Versions) -> None:
    """Another process's change waits, and this thread's own ones do not."""
    code = "import sys; from pathlib import Path; from fedtune.delivery.versions import Versions; Versions(Path(sys.argv[1])).activate('b')"
    with three.locked():
        other = subprocess.Popen([sys.executable, "-c", code, str(three.folder.parent)])
        three.activate("a")
        time.sleep(0.5)
        assert other.poll() is None and three.current() == "a"
    assert other.wait(30) == 0 and three.current() == "b"


LOOP = """
import itertools, sys
from pathlib import Path
from fedtune.delivery.versions import Versions
versions = Versions(Path(sys.argv[1]))
print("begun", flush=True)
for name in itertools.cycle("ab"):
    versions.activate(name)
"""


@pytest.mark.slow
def test_processes_that_are_killed_leave_a_current_version(three: Versions) -> None:
    three.activate("c")
    for _ in range(8):
        both = [subprocess.Popen([sys.executable, "-c", LOOP, str(three.folder.parent)], stdout=subprocess.PIPE) for _ in range(2)]
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        seen = set[str | None]()
        end = time.monotonic() + 0.3
        while time.monotonic() < end or len(seen - {"c"}) < 2:
            seen.add(three.current())
        for process in both:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert seen <= {"a", "b", "c"} and three.current() in ("a", "b")
    three.activate("c")
    assert three.current() == "c" and sorted(path.name for path in three.folder.iterdir()) == ["current", "versions"]


def test_the_module_needs_no_torch() -> None:
    code = "import sys, fedtune.delivery.versions; sys.exit(bool({'torch', 'numpy', 'flwr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""After any interruption, a file or folder is complete or unchanged."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.storage.atomic import new_file, new_folder, write_bytes, write_text
from tests.test_starts import DISK, Killed


def by_new_file(place: Path) -> None:
    with new_file(place) as beside:
        beside.write_text("new")


def by_new_folder(place: Path) -> None:
    with new_folder(place, replace=True) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")


def content(place: Path) -> str | list[str]:
    return [file.read_text() for file in sorted(place.iterdir())] if place.is_dir() else place.read_text()


WRITERS: dict[str, tuple[Callable[[Path], None], str | list[str]]] = {
    "new_file": (by_new_file, "new"),
    "write_text": (lambda place: write_text(place, "new"), "new"),
    "write_bytes": (lambda place: write_bytes(place, b"new", mode=0o600), "new"),
    "shared": (lambda place: write_text(place, "new", durable=False, shared=True), "new"),
    "new_folder": (by_new_folder, ["new", "new"]),
}


@pytest.mark.parametrize("stop", [Killed, OSError], ids=["killed", "disk full"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_write_is_complete_or_absent_after_any_stop(tmp_path: Path, name: str, stop: type[BaseException]) -> None:
    write, expected = WRITERS[name]
    operations = 0
    while True:
        folder = tmp_path / str(operations)
        place = folder / "place"
        folder.mkdir()
        try:
            stopped = DISK.stops(lambda _: write(place), folder, operations, stop)  # noqa: B023  called here
        except OSError:
            stopped = True
            assert not [p for p in folder.iterdir() if p.name != "place"]  # an incomplete write frees its disk space
        assert not place.exists() or content(place) == expected
        write(place)
        assert content(place) == expected
        if name != "shared":
            assert list(folder.iterdir()) == [place]  # the remains of a kill are removed
        if not stopped:
            break
        operations += 1
    assert operations >= 2


@pytest.mark.parametrize("open_new", [new_file, new_folder])
def test_an_exception_leaves_the_old_content(tmp_path: Path, open_new: Callable[[Path], object]) -> None:
    place = tmp_path / "place"
    with pytest.raises(KeyError), open_new(place) as beside:  # pyright: ignore
        assert beside.parent == tmp_path and beside.name == ".place.tmp"
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_non_empty_folder_is_replaced_only_with_replace(tmp_path: Path) -> None:
    by_new_folder(tmp_path / "place")
    (tmp_path / "place" / "c").write_text("old")
    with pytest.raises(OSError), new_folder(tmp_path / "place"):  # noqa: PT011  the system's own sentence
        pass
    assert content(tmp_path / "place") == ["new", "new", "old"]
    by_new_folder(tmp_path / "place")
    assert content(tmp_path / "place") == ["new", "new"]


def test_the_mode_applies_from_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = os.fchmod
    monkeypatch.setattr(os, "fchmod", lambda handle, mode: (seen.append(stat.S_IMODE(os.fstat(handle).st_mode)), real(handle, mode)))
    before = os.umask(0)
    try:
        write_bytes(tmp_path / "secret", b"x", mode=0o600)
        write_bytes(tmp_path / "open", b"x", mode=0o644)
    finally:
        os.umask(before)
    assert seen == [0o600, 0o600]
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("secret", "open")] == [0o600, 0o644]


def test_a_lone_surrogate_is_written_as_a_question_mark(tmp_path: Path) -> None:
    write_text(tmp_path / "answers", "a\ud83d")
    assert (tmp_path / "answers").read_bytes() == b"a?"

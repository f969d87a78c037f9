"""Atomic writes: a file or folder is written under a temporary name beside its target and then renamed.

A kill, a full disk or an exception leaves the old content. A temporary `.NAME.tmp` that a kill leaves is removed by the next attempt.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REMOVED = ".removed"  # end of the hidden name of a folder whose removal has begun


@contextmanager
def new_file(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A path to write to; the file becomes `path` when the block ends and is removed when the block raises.

    Args:
        path: Target; an existing file is replaced. Its folder must exist.
        durable: Whether the file must survive a power failure after the block has ended.
        shared: Whether several processes may write `path` at once. Each then uses a random temporary name, which a kill leaves behind.

    Raises:
        OSError: The file cannot be written.
    """
    beside = _beside(path, shared)
    beside.unlink(missing_ok=True)
    try:
        yield beside
        if durable:
            flush(beside)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    if durable:
        flush(path.parent)


@contextmanager
def new_folder(path: Path, *, mode: int = 0o777, replace: bool = False, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """An empty folder to fill; it becomes `path` when the block ends and is removed when the block raises.

    Args:
        path: Target; must not exist or be an empty folder, unless `replace` is set. The parent folder must exist.
        mode: Permissions of the new folder, less the umask.
        replace: Remove an existing folder just before the new one is renamed.
        durable: As for `new_file`.
        shared: As for `new_file`.

    Raises:
        OSError: The folder cannot be written, or `path` is not empty.
    """
    beside = _beside(path, shared)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(mode)
        yield beside
        if durable:
            for inner in (*beside.rglob("*"), beside):
                flush(inner)
        if replace and path.exists():
            shutil.rmtree(path)
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if durable:
        flush(path.parent)


def write_bytes(path: Path, data: bytes, *, mode: int | None = None, durable: bool = True, shared: bool = False) -> None:
    """Write a file atomically.

    Args:
        path: As for `new_file`.
        data: Content.
        mode: Permissions, independent of the umask; they are never wider, even during the write. None takes the default ones.
        durable: As for `new_file`.
        shared: As for `new_file`.

    Raises:
        OSError: The file cannot be written.
    """
    first = 0o666 if mode is None else 0o600
    with (
        new_file(path, durable=durable, shared=shared) as beside,
        open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, first), "wb") as file,
    ):
        file.write(data)
        if mode is not None:
            os.fchmod(file.fileno(), mode)


def write_text(path: Path, text: str, *, durable: bool = True, shared: bool = False) -> None:
    """Write a UTF-8 file atomically. A lone surrogate, which a model's answer may contain, becomes a question mark.

    Raises:
        OSError: The file cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "replace"), durable=durable, shared=shared)


def write_link(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`, atomically: an existing link or file is replaced.

    Raises:
        OSError: The link cannot be written, or `path` is a folder.
    """
    beside = _beside(path, shared=False)
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    try:
        os.replace(beside, path)
    except OSError:
        beside.unlink()
        raise
    flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; after a kill it is whole or gone: it is first renamed to `.NAME.removed`, which `remove_leftovers` removes.

    Raises:
        OSError: It cannot be removed.
    """
    hidden = path.with_name(f".{path.name}{_REMOVED}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    flush(path.parent)
    shutil.rmtree(hidden)


def remove_leftovers(parent: Path) -> None:
    """Remove the folders in `parent` that `remove_folder` had begun to remove."""
    for hidden in parent.glob(f".*{_REMOVED}"):
        shutil.rmtree(hidden, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync).

    Raises:
        OSError: The disk reports an error.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, shared: bool) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp" if shared else f".{path.name}.tmp")

"""Files and folders that appear whole or not at all: each is written beside its place and then renamed.

A kill, a full disk or an exception leaves what was there before. What a kill leaves beside it, `.NAME.tmp`, is removed by the next attempt.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_file(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A path to write to; the file becomes `path` when the block ends and is removed when the block raises.

    Args:
        path: A file that is there already is replaced. Its folder must exist.
        durable: The file survives a power failure once the block has ended.
        shared: Several processes may write `path` at once. Each then writes under a random name, which a kill leaves behind.

    Raises:
        OSError: The disk does not take it.
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
        path: Not there yet, an empty folder, or anything with `replace`. The folder above it must exist.
        mode: Permissions of the new folder, less the umask.
        replace: Remove a folder that is there already, just before the new one takes its name.
        durable: As for `new_file`.
        shared: As for `new_file`.

    Raises:
        OSError: The disk does not take it, or `path` holds something.
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
    """Write a file whole or not at all.

    Args:
        path: As for `new_file`.
        data: Its content.
        mode: Its permissions, whatever the umask; at no moment are they wider. None takes the usual ones.
        durable: As for `new_file`.
        shared: As for `new_file`.

    Raises:
        OSError: The disk does not take it.
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
    """Write a UTF-8 file whole or not at all; half a surrogate pair, which a model's answer may hold, becomes a question mark.

    Raises:
        OSError: The disk does not take it.
    """
    write_bytes(path, text.encode("utf-8", "replace"), durable=durable, shared=shared)


def flush(path: Path) -> None:
    """Have the disk store a file's content, or the names in a folder, before this returns.

    Raises:
        OSError: The disk does not take it.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path, shared: bool) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp" if shared else f".{path.name}.tmp")

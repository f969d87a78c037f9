"""The SuperLink's database. It is created beside its final path and renamed, so that a kill or a full disk leaves no partial database.

It holds the clients' node ids and the messages of the current run. Every start ends that run, so an incomplete database is deleted and
the nodes register again.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from sqlalchemy import create_engine

from fedtune.network import _flwr
from fedtune.storage.atomic import new_file

_log = logging.getLogger("fedtune.superlink")


def make_database(path: Path, patience_s: float) -> None:
    """Ensure that a complete database of this version of Flower is at `path`.

    Args:
        path: The database file, in an existing folder; no other process uses it.
        patience_s: Seconds to wait while the database is locked.

    Raises:
        SQLAlchemyError, sqlite3.Error, OSError: It cannot be written or read.
    """
    if path.exists():
        if is_whole(path, patience_s):
            return
        _log.warning("the database is incomplete or of another version: creating a new one", extra={"why": str(path)})
    with new_file(path, durable=False) as beside:
        for file in (*_files(beside), *_files(path)):
            file.unlink(missing_ok=True)
        engine = create_engine(f"sqlite:///{beside}")
        try:
            _flwr.run_migrations(engine)
        finally:
            engine.dispose()


def is_whole(path: Path, patience_s: float) -> bool:
    """Whether all of Flower's migrations have run on the database.

    Raises:
        sqlite3.OperationalError: Another process has it locked.
    """
    wanted = _flwr.newest_migrations()
    try:
        with closing(sqlite3.connect(path, timeout=patience_s)) as opened:
            return {name for (name,) in opened.execute("SELECT version_num FROM alembic_version")} == wanted
    except sqlite3.DatabaseError as bad:
        if "locked" in str(bad):
            raise
        return False  # no such table, or not a database


def _files(path: Path) -> Iterator[Path]:
    return (path.with_name(path.name + end) for end in ("", "-wal", "-shm", "-journal"))

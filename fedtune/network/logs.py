"""Logs for machines: one JSON object a line, with what happened and to whom."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_MB, _KEPT = 10, 3


class JsonLines(logging.Formatter):
    """`{"time", "level", "event", …}`: the record's own fields, and whatever `extra=` gave it."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "event": record.getMessage(),
        }
        more = {name: value for name, value in vars(record).items() if name not in _PLAIN and value is not None}
        if record.exc_info:
            more["trace"] = self.formatException(record.exc_info)
        return json.dumps({**said, **more}, default=str)


@contextmanager
def logging_to(file: Path) -> Iterator[None]:
    """Everything that fedtune logs, from `info` up, goes to this file, warnings to the terminal too."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = RotatingFileHandler(file, maxBytes=_MB * 10**6, backupCount=_KEPT, encoding="utf-8")
    handler.setFormatter(JsonLines())
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    logger = logging.getLogger("fedtune")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries give the root a handler of their own, which would put every line on the terminal
    for h in (handler, terminal):
        logger.addHandler(h)
    try:
        yield
    finally:
        for h in (handler, terminal):
            logger.removeHandler(h)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        handler.close()

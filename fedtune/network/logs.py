"""Machine-readable logs: one JSON object per line."""

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
    """Formats `{"time", "level", "event", …}`: the record's own fields and those from `extra=`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "from": record.name,
            "event": record.getMessage(),
        }
        more = {name: value for name, value in vars(record).items() if name not in _PLAIN and value is not None}
        if record.exc_info:
            more["trace"] = self.formatException(record.exc_info)
        return json.dumps({**fields, **more}, default=str)


@contextmanager
def logging_to(file: Path) -> Iterator[None]:
    """Write fedtune's log records from level INFO to this file, and warnings to the terminal too."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = RotatingFileHandler(file, maxBytes=_MB * 10**6, backupCount=_KEPT, encoding="utf-8")
    handler.setFormatter(JsonLines())
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    logger = logging.getLogger("fedtune")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries add a handler to the root logger, which would print every line on the terminal
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

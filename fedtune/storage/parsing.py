"""Reads untrusted files, JSON and YAML.

A faulty text raises ValueError and a faulty file OSError, each with a short reason that the caller's sentence can end with. Python's own
parsers raise RecursionError on deep nesting and give interpreter hints for long numbers, and reading a pipe or a device may never end.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """Parse JSON; `hooks` are passed to `json.loads`.

    Raises:
        ValueError: The text is not JSON (JSONDecodeError, with the position), is nested too deeply, or has a number that is too long.
    """
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as bad:
        raise ValueError(reason(bad)) from None


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        ValueError: The text is not YAML, is nested too deeply, or has a number that is too long.
    """
    import yaml  # imported here because the engine reads only JSON

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as bad:
        at = f"line {bad.problem_mark.line + 1}: " if bad.problem_mark else ""
        raise ValueError(f"{at}{bad.problem or 'it is not YAML'}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as bad:
        raise ValueError(reason(bad)) from None


def reason(bad: BaseException) -> str:
    """A short reason for an exception of one of Python's parsers."""
    if isinstance(bad, RecursionError):
        return "nested too deeply"
    if "integer string conversion" in str(bad):
        return "a number has too many digits"
    return next((line.strip() for line in str(bad).splitlines() if line.strip()), type(bad).__name__)


def regular(path: Path) -> os.stat_result:
    """The status (size, times, …) of a regular file.

    Raises:
        OSError: The file does not exist, or it is a pipe, a device or a folder.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a folder" if path.is_dir() else "it is a pipe or a device, not a file", str(path))
    return found


def content_of(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: As for `regular`; or the file cannot be read.
    """
    regular(path)
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with its line ends as \\n.

    Raises:
        OSError: As for `content_of`.
        UnicodeDecodeError: The file is not UTF-8.
    """
    return content_of(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")

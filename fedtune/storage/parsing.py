"""Files, JSON and YAML that fedtune did not write itself, or that somebody may have changed since.

Whatever is wrong with a text is a ValueError and whatever is wrong with a file an OSError, both with a reason of a few words, so that the
caller's sentence can end with it. Python's own parsers raise a RecursionError over deep nesting, count digits in a hint about its
interpreter, and reading a pipe or a device never ends.
"""

import errno
import json
import stat
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """The value; `hooks` are those of `json.loads`.

    Raises:
        ValueError: It is no JSON (a JSONDecodeError where it says at which place), nested too deeply, or a number is too long.
    """
    try:
        return json.loads(text, **hooks)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as bad:
        raise ValueError(reason(bad)) from None


def parse_yaml(text: str) -> Any:
    """The value.

    Raises:
        ValueError: It is no YAML, nested too deeply, or a number is too long.
    """
    import yaml  # the engine reads JSON alone and does without it

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as bad:
        at = f"line {bad.problem_mark.line + 1}: " if bad.problem_mark else ""
        raise ValueError(f"{at}{bad.problem or 'it is no YAML'}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as bad:
        raise ValueError(reason(bad)) from None


def reason(bad: BaseException) -> str:
    """What a parser of Python's has against a text, in a few words."""
    if isinstance(bad, RecursionError):
        return "nested too deeply"
    if "integer string conversion" in str(bad):
        return "a number has too many digits"
    return next((line.strip() for line in str(bad).splitlines() if line.strip()), type(bad).__name__)


def content_of(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: It cannot be read, or it is a pipe, a device or a folder.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a folder" if path.is_dir() else "it is a pipe or a device, and no file", str(path))
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with its line ends as \\n.

    Raises:
        OSError: As `content_of`.
        UnicodeDecodeError: It is no UTF-8.
    """
    return content_of(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")

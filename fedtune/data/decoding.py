"""Decode a file's bytes by a given or detected encoding."""

import logging
import re
from pathlib import Path

from fedtune.errors import ConfigError, DataError

log = logging.getLogger("fedtune.data")

MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # longest first


def decode(raw: bytes, file: Path, encoding: str, *, table: bool = False) -> str:
    """The text of a file, without its byte order mark.

    Args:
        raw: Its bytes.
        file: Its name, for errors.
        encoding: As `data.encoding`.
        table: Whether `auto` may decode bytes that are not UTF-8 as Windows-1252, with a warning: many spreadsheets write csv that way.

    Raises:
        ConfigError: The encoding is unknown.
        DataError: The bytes do not have this encoding.
    """
    name = (sniff(raw, table) or "utf-8") if encoding == "auto" else encoding
    try:
        text = raw.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError as bad:
        line = raw.count(b"\n", 0, bad.start) + 1
        hint = sniff(raw, True) or ("latin-1" if _western(raw) else "cp1251")
        raise DataError(
            f"{file}: byte 0x{raw[bad.start]:02x} at offset {bad.start} (line {line}) is not {name}:"
            f" set data.encoding to the file's encoding, such as data.encoding={hint}"
        ) from None
    except LookupError:
        raise ConfigError(f"data.encoding={encoding} is not known: give auto, or a name such as utf-8, latin-1 or cp1252") from None
    if encoding == "auto" and name == "cp1252":
        word = re.search(r"\w*[^\x00-\x7f]+\w*", text)
        shown = f" ('{word[0][:20]}')" if word else ""
        log.warning("%s is not UTF-8 and is read as Windows-1252%s: if that is wrong, set data.encoding", file, shown)
    return text


def sniff(raw: bytes, table: bool) -> str | None:
    """The detected encoding: by a byte order mark, zeros in every other byte, or valid UTF-8; for a table also Western Windows-1252."""
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            return name
    even, odd = raw[:1000:2], raw[1:1000:2]
    for zeros, others, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):  # ASCII in UTF-16
        if zeros and zeros.count(0) > 0.8 * len(zeros) and others.count(0) < 0.2 * len(others):
            return name
    for name in ("utf-8", "cp1252"):
        if name == "utf-8" or (table and _western(raw)):
            try:
                raw.decode(name)
            except UnicodeDecodeError:
                continue
            return name
    return None


def _western(raw: bytes) -> bool:
    """Whether non-ASCII letters occur alone or in pairs, as in Western languages; Cyrillic, Greek or Chinese text has long runs."""
    high = len(re.findall(rb"[\xc0-\xff]", raw))
    return 10 * sum(map(len, re.findall(rb"[\xc0-\xff]{3,}", raw))) <= high

"""Split plain text into records: one for each line, or one for each match of a regular expression, with its named groups as columns.

Speeches of a play, client and text: ``(?s)^(?P<client>[^\\n:]+):\\n(?P<text>.+?)(?=\\n\\n|\\Z)``.
Questions with a label, ``LABEL:fine text``: ``^(?P<label>[A-Z]+):\\S+ (?P<text>.+)$``.
"""

import logging
import re

from fedtune.errors import ConfigError, DataError

log = logging.getLogger("fedtune.data")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """`data.record_pattern`, compiled with re.MULTILINE.

    Raises:
        ConfigError: It is not a regular expression, or has no named group.
    """
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as bad:
        raise ConfigError(f"data.record_pattern={pattern!r} is not a regular expression: {bad}") from None
    if not compiled.groupindex:
        raise ConfigError(f"data.record_pattern={pattern!r} has no named group: name the columns, such as (?P<text>...)")
    return compiled


def lines(text: str, where: str) -> list[dict[str, str | None]]:
    """One record for each nonblank line, in the column `text`."""
    return [{"text": line} for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def matches(text: str, pattern: re.Pattern[str], where: str) -> list[dict[str, str | None]]:
    """One record for each match; text outside of all matches is left out, with a warning if it is more than white space.

    Raises:
        DataError: There is no match.
    """
    text = text.replace("\r\n", "\n")
    found, outside, end = [], 0, 0
    for match in pattern.finditer(text):
        if match.group():  # a pattern such as (?P<text>.*) also matches the empty string at the end of each line
            found.append(match.groupdict())
        outside += len(text[end : match.start()].strip())
        end = match.end()
    if not found:
        raise DataError(f"{where}: data.record_pattern={pattern.pattern!r} has no match; the text starts with {text[:40]!r}")
    if outside := outside + len(text[end:].strip()):
        log.warning("%s: %d of %d characters belong to no record of data.record_pattern and are left out", where, outside, len(text))
    return found

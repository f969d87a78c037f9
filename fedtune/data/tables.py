"""Parse csv and tsv files, including the variants of common spreadsheets."""

import csv
import io
import re
from collections.abc import Collection, Sequence
from typing import Any

from fedtune.errors import DataError

DELIMITERS = ",;\t|"
_LOOK = 100_000  # characters for the detection of the delimiter


def read_csv(text: str, where: str, used: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Rows below a header line; quotes as in RFC 4180, so a field may hold delimiters and line breaks.

    Args:
        text: Text of the file.
        where: Its name, for errors.
        used: Columns to read; None reads all.

    Raises:
        DataError: A line is malformed; names the line and the fault.
    """
    delimiter, text, blanks, first = _dialect(text, used or ())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=blanks, strict=True)
    records = []
    try:
        for record in reader:
            records.append((reader.line_num + first, record))
    except csv.Error as bad:
        line = reader.line_num + first
        raise DataError(f"{where} line {line} is not csv ({bad}): write a quote inside a quoted field twice") from None
    return _rows(records, where, used)


def read_tsv(text: str, where: str, used: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Tab-separated rows below a header line, without quoting, as in GLUE: a quote is a normal character.

    Arguments and errors are those of `read_csv`.
    """
    return _rows([(number, line.rstrip("\r").split("\t")) for number, line in enumerate(text.split("\n"), 1)], where, used)


def header(text: str, kind: str, used: Collection[str]) -> list[str]:
    """The column names of a csv or tsv file, from the start of its text."""
    if kind == "tsv":
        records: Sequence[list[str]] = [line.rstrip("\r").split("\t") for line in text.split("\n")]
    else:
        delimiter, text, blanks, _ = _dialect(text, used)
        records = _first(text, delimiter, blanks)
    return [name.strip() for name in next((record for record in records if _filled(record)), [])]


def _dialect(text: str, used: Collection[str]) -> tuple[str, str, bool, int]:
    """The delimiter, the text of the table, whether blanks follow the delimiters, and the number of lines before the table."""
    csv.field_size_limit(2**30)  # the default, 128 KB, is too short for long documents
    if line := re.match(r'"?sep=([^\r\n])"?(\r\n|\r|\n)', text):  # Excel's first line, which is not part of the table
        delimiter, text, lines = line[1], text[line.end() :], 1
    else:
        delimiter, lines = max(DELIMITERS, key=lambda d: _fit(_first(text, d), used)), 0
    names = next((record for record in _first(text, delimiter) if _filled(record)), [])
    return delimiter, text, any(name != name.lstrip() for name in names[1:]), lines


def _first(text: str, delimiter: str, blanks: bool = False) -> list[list[str]]:
    """The first ten records, parsed leniently."""
    reader = csv.reader(io.StringIO(text[:_LOOK], newline=""), delimiter=delimiter, skipinitialspace=blanks)
    records: list[list[str]] = []
    for record in reader:
        if _filled(record):
            records.append(record)
        if len(records) == 10:
            return records
    return records[:-1] if len(text) > _LOOK and len(records) > 1 else records  # the last one may be incomplete


def _fit(records: list[list[str]], used: Collection[str]) -> tuple[int, float, int]:
    """Score of a delimiter: used columns in the header, share of records with the header's width, width. A single column scores lowest."""
    if not records or len(records[0]) == 1:
        return 0, 0.0, 0
    wide = len(records[0])
    return len({name for name in records[0]} & {*used}), sum(len(r) == wide for r in records) / len(records), wide


def _filled(record: list[str]) -> bool:
    return any(field.strip() for field in record)


def _rows(records: list[tuple[int, list[str]]], where: str, used: Collection[str] | None) -> list[dict[str, Any]]:
    """The records below the header line; records without any text are left out."""
    records = [(number, record) for number, record in records if _filled(record)]
    if not records:
        return []
    names, rest = [name.strip() for name in records[0][1]], records[1:]
    if doubled := sorted({name for name in names if names.count(name) > 1 and (used is None or name in used)}):
        raise DataError(f"{where}: two columns are called '{doubled[0]}' in the header line: rename one")
    for number, record in rest:
        if len(record) != len(names):
            raise DataError(f"{where} line {number} has {len(record)} fields, but the header has {len(names)} ({', '.join(names)[:100]})")
    return [dict(zip(names, record, strict=True)) for _, record in rest]

"""Read local files: jsonl, json (an array), csv, tsv, parquet and text, each also as .gz; given as a file, a folder or a glob.

Our own parsers replace `datasets.load_dataset`, which copies every file into a cache under the user's home and does not name a broken line.
Files are read whole: a client's training rows fit into memory.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config import DataConfig
from fedtune.contracts.rows import RowSet
from fedtune.data.decoding import decode
from fedtune.data.records import compile_pattern, lines, matches
from fedtune.data.tables import read_csv, read_tsv
from fedtune.data.values import typed
from fedtune.errors import ConfigError, DataError
from fedtune.storage.parsing import content_of, parse_json

Records = list[dict[str, Any]]

SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip


_UNUSED = ("client", "device_class", "label")  # a source may have columns of these names for other purposes


@dataclass(frozen=True)
class Columns:
    """The columns of a file to read.

    Args:
        required: Columns that the task or the settings name; an unreadable one is an error.
        optional: Columns that are used if present; an unreadable `client`, `device_class` or `label` becomes empty.
        conversations: Columns whose lists are kept as JSON text, because the keys and types of their messages may differ.
    """

    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    conversations: frozenset[str] = frozenset()

    @property
    def used(self) -> frozenset[str]:
        return self.required | self.optional


def read_local(config: DataConfig, columns: Columns | None = None) -> tuple[RowSet, RowSet | None]:
    """The training rows of `data.path` and, if set, the test rows of `data.test_path`, with the files' columns.

    Columns not in `columns` keep their names but are empty; None reads all columns. Files matched by both paths are test files only, so
    that `data.path` can be a folder that contains the test file.

    Raises:
        ConfigError: `data.path` is not set.
        DataError: A file cannot be read; names the file, the line or byte, and a way out.
    """
    files, test_files = local_files(config)
    tests = read_files(test_files, config, False, columns) if test_files else None
    return read_files(files, config, config.client_from_file, columns), tests


def local_files(config: DataConfig) -> tuple[list[Path], list[Path]]:
    """The training files and the test files; files of `data.test_path` are not training files.

    Raises:
        ConfigError: `data.path` is not set.
        DataError: No file exists, or all are test files.
    """
    if not config.path:
        raise ConfigError("data=local needs data.path: a file, a folder or a glob")
    test_files = find_files(config.test_path, "data.test_path", config) if config.test_path else []
    held = {file.resolve() for file in test_files}
    files = [file for file in find_files(config.path, "data.path", config) if file.resolve() not in held]
    if not files:
        raise DataError(f"data.path={config.path} has only test files (data.test_path={config.test_path}): add a training file")
    if config.client_from_file:
        check_stems(files)
    return files, test_files


def read_test(config: DataConfig, columns: Columns | None = None) -> RowSet:
    """The rows of `data.test_path` alone.

    Raises:
        DataError: A file cannot be read; names the file, the line or byte, and a way out.
    """
    return read_files(find_files(str(config.test_path), "data.test_path", config), config, False, columns)


def has_files(where: str) -> bool:
    """Whether a path, folder or glob matches a file on this machine."""
    path = Path(where).expanduser()
    return bool(where) and (path.exists() or any(glob.iglob(str(path), recursive=True)))


def find_files(where: str, key: str, config: DataConfig) -> list[Path]:
    """The files of a path, folder or glob, sorted by name; hidden files and, in a folder, files of unknown formats are left out."""
    path = Path(where).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            pattern = glob.has_magic(str(path))
            raise DataError(f"{key}={where} {'matches no file' if pattern else 'does not exist'}: give a file, a folder or a glob")
        return found
    inside = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if config.format == "auto":
        inside = [file for file in inside if suffix(file) in SUFFIXES]
        formats = sorted({SUFFIXES[suffix(file)] for file in inside})
        if len(formats) > 1:
            raise DataError(f"{key}={where} has {' and '.join(formats)} files: set data.format or give a glob such as *.{formats[0]}")
    else:
        # data.format also takes files of unknown suffixes, but not those of another format
        inside = [file for file in inside if SUFFIXES.get(suffix(file), config.format) == config.format]
    if not inside:
        raise DataError(f"{key}={where} has no data file ({', '.join(SUFFIXES)}, or .gz of these): give another folder or set data.format")
    return inside


def suffix(file: Path) -> str:
    """The last suffix in lower case, not counting .gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def stem(file: Path) -> str:
    """The name without suffix and .gz, which is the client id of `data.client_from_file`."""
    name = file.name[:-3] if file.name.lower().endswith(".gz") else file.name
    return Path(name).stem.strip()


def check_stems(files: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        if (other := seen.setdefault(stem(file), file)) is not file:
            raise DataError(f"data.client_from_file: {other} and {file} are both client '{stem(file)}': rename one of them")


def read_files(files: list[Path], config: DataConfig, client_from_file: bool, read: Columns | None = None) -> RowSet:
    """All rows of the files in order, with the union of their columns; columns not in `read` are empty."""
    rows: Records = []
    for file in files:
        found = read_file(file, config, None if read is None else read.used)
        if client_from_file:
            if found and "client" in found[0]:
                raise DataError(f"{file} already has a column 'client': set data.client_from_file=false, or rename the column")
            for row in found:
                row["client"] = stem(file)
        rows += found
    if not rows:
        raise DataError(f"{files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''}: no rows")
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    columns, types = dict[str, list[Any]](), dict[str, str]()
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            unread = read is not None and name not in read.used
            values = [row.get(name) for row in rows]
            if read is not None and name in read.conversations:
                values = [json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list) else value for value in values]
            columns[name], types[name] = typed([None] * len(rows) if unread else values)
        except UnicodeEncodeError as bad:  # JSON can contain half a surrogate pair, which is not text
            raise DataError(f"{where}: column '{name}' has {bad.object[bad.start]!r}, which is not a character: clean the file") from None
        except (TypeError, ValueError, OverflowError) as bad:  # Arrow's
            if read is None or name in read.required or name not in _UNUSED:
                reason = str(bad).splitlines()[0][:100]
                raise DataError(f"{where}: column '{name}' has values of several types ({reason}): give all its values one type") from None
            columns[name], types[name] = typed([None] * len(rows))
    return RowSet(columns, types)


def read_file(file: Path, config: DataConfig, used: Collection[str] | None = None) -> Records:
    """The rows of one file.

    Args:
        file: Its name.
        config: Format, encoding and pattern.
        used: The columns to read; in formats that can be read by column the others become None. None reads all columns.

    Raises:
        DataError: The file is missing, empty, damaged, of an unknown format, or not in `data.encoding`.
    """
    kind = format_of(file, config)
    raw = read_bytes(file)
    if not raw:
        raise DataError(f"{file} is empty: give a file with {kind} rows")
    if kind == "parquet":
        return read_parquet(raw, str(file), used)
    text = decode(raw, file, config.encoding, table=kind in TABLES)
    if kind in TABLES:
        return TABLES[kind](text, str(file), used)
    if kind == "text":
        return matches(text, compile_pattern(config.record_pattern), str(file)) if config.record_pattern else lines(text, str(file))
    return READERS[kind](text, str(file))


def format_of(file: Path, config: DataConfig) -> str:
    """The format of a file: `data.format`, or that of its suffix if `data.format` is auto.

    Raises:
        ConfigError: `data.record_pattern` is set for a format other than text.
        DataError: The suffix is unknown.
    """
    kind = config.format
    if kind == "auto":
        kind = SUFFIXES.get(suffix(file), "text" if config.record_pattern else "")
        if not kind:
            raise DataError(f"{file} has an unknown suffix: set data.format to one of {', '.join(dict.fromkeys(SUFFIXES.values()))}")
    if config.record_pattern and kind != "text":
        raise ConfigError(f"data.record_pattern splits text, but {file} is {kind}: set data.format=text or remove the pattern")
    return kind


def read_bytes(file: Path) -> bytes:
    try:
        raw = content_of(file)
        return gzip.decompress(raw) if file.name.lower().endswith(".gz") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as bad:
        raise DataError(f"{file} is not a complete gzip file ({bad}): copy it again") from None
    except OSError as bad:
        raise DataError(f"cannot read {file}: {bad.strerror}") from None


def read_jsonl(text: str, where: str) -> Records:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_object(_json(line, f"{where} line {number}", "one JSON object a line"), f"{where} line {number}"))
    return rows


def read_json(text: str, where: str) -> Records:
    values = _json(text, where, "a JSON array of objects (for one object a line set data.format=jsonl)")
    if not isinstance(values, list):
        raise DataError(f"{where} is a JSON {type(values).__name__}: write an array of objects")
    return [_object(value, f"{where} item {number}") for number, value in enumerate(values, 1)]


def _json(text: str, where: str, wanted: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as bad:
        at = f" at line {bad.lineno}, column {bad.colno}" if isinstance(bad, json.JSONDecodeError) and bad.lineno > 1 else ""
        reason = bad.msg if isinstance(bad, json.JSONDecodeError) else str(bad)
        raise DataError(f"{where} is not JSON{at} ({reason}): write {wanted}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where} is a JSON {type(value).__name__}: write an object such as {{"text": ...}}')
    return dict(value)


def read_parquet(raw: bytes, where: str, used: Collection[str] | None = None) -> Records:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw))
        names = file.schema_arrow.names
        rows = file.read([name for name in names if used is None or name in used]).to_pylist()
        return [{name: row.get(name) for name in names} for row in rows]
    except (pa.ArrowException, OSError) as bad:
        raise DataError(f"{where} is not a parquet file ({str(bad).splitlines()[0][:100]}): copy it again, or set data.format") from None


TABLES = {"csv": read_csv, "tsv": read_tsv}
READERS: dict[str, Callable[[str, str], Records]] = {"jsonl": read_jsonl, "json": read_json}

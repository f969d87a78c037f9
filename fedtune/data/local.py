"""Local files → rows: jsonl, json (an array), csv, tsv, parquet and text, each also as .gz; a file, a folder or a glob.

Parsed here rather than by `datasets.load_dataset`, which copies every file into a cache under the user's home and does not say which line
is broken. Files are read whole: what a client trains on fits into memory.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import DataConfig
from fedtune.data.decoding import decode
from fedtune.data.records import compile_pattern, lines, matches
from fedtune.data.tables import read_csv, read_tsv
from fedtune.errors import ConfigError, DataError
from fedtune.storage.parsing import content_of, parse_json

if TYPE_CHECKING:  # a command that only looks at files starts without it
    import datasets

Rows = list[dict[str, Any]]

SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text"
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read.

    Args:
        asked: What the task or the settings name: refused if it cannot be read.
        optional: What is used where it can be: left empty if it cannot be read.
    """

    asked: frozenset[str]
    optional: frozenset[str] = frozenset()

    @property
    def used(self) -> frozenset[str]:
        return self.asked | self.optional


def read_local(config: DataConfig, columns: Columns | None = None) -> "tuple[datasets.Dataset, datasets.Dataset | None]":
    """The training rows of `data.path` and, where `data.test_path` is set, the test rows; columns as in the files.

    Columns that `columns` does not name keep their names and hold nothing; None reads all.
    Files of `test_path` that `path` matches too are test files only, so that a folder that holds its own test set can be named as a whole.

    Raises:
        ConfigError: `data.path` is not set.
        DataError: Names the file, the line or byte, and what to do.
    """
    files, test_files = local_files(config)
    tests = read_files(test_files, config, False, columns) if test_files else None
    return read_files(files, config, config.client_from_file, columns), tests


def local_files(config: DataConfig) -> tuple[list[Path], list[Path]]:
    """The training files and the test files; what `data.test_path` means is no training file.

    Raises:
        ConfigError: `data.path` is not set.
        DataError: There is no such file, or none is left to train on.
    """
    if not config.path:
        raise ConfigError("data=local needs data.path: a file, a folder or a glob")
    test_files = find_files(config.test_path, "data.test_path", config) if config.test_path else []
    held = {file.resolve() for file in test_files}
    files = [file for file in find_files(config.path, "data.path", config) if file.resolve() not in held]
    if not files:
        raise DataError(f"data.path={config.path} holds only test files (data.test_path={config.test_path}): nothing is left to train on")
    if config.client_from_file:
        check_stems(files)
    return files, test_files


def read_test(config: DataConfig, columns: Columns | None = None) -> "datasets.Dataset":
    """The rows of `data.test_path` alone.

    Raises:
        DataError: Names the file, the line or byte, and what to do.
    """
    return read_files(find_files(str(config.test_path), "data.test_path", config), config, False, columns)


def has_files(where: str) -> bool:
    """Whether a path, folder or glob means any file on this machine."""
    path = Path(where).expanduser()
    return bool(where) and (path.exists() or any(glob.iglob(str(path), recursive=True)))


def find_files(where: str, key: str, config: DataConfig) -> list[Path]:
    """The files that a path, folder or glob means, sorted by name; hidden files and, in a folder, files of no known format are left out."""
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
            raise DataError(f"{key}={where} holds {' and '.join(formats)} files: set data.format or give a glob such as *.{formats[0]}")
    else:
        # with a format named, unknown suffixes count; those of another format do not
        inside = [file for file in inside if SUFFIXES.get(suffix(file), config.format) == config.format]
    if not inside:
        raise DataError(f"{key}={where} holds no data file: wanted {', '.join(SUFFIXES)} (or .gz of them), or set data.format")
    return inside


def suffix(file: Path) -> str:
    """The last suffix in lower case, not counting .gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def stem(file: Path) -> str:
    """The name without suffix and .gz: the client id of `data.client_from_file`."""
    name = file.name[:-3] if file.name.lower().endswith(".gz") else file.name
    return Path(name).stem.strip()


def check_stems(files: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        if (other := seen.setdefault(stem(file), file)) is not file:
            raise DataError(f"data.client_from_file: {other} and {file} are both client '{stem(file)}': give the files names of their own")


def read_files(files: list[Path], config: DataConfig, client_from_file: bool, read: Columns | None = None) -> "datasets.Dataset":
    """All rows of the files, one after the other; columns are the union of the files' columns, empty where `read` does not name them."""
    import datasets
    import pyarrow as pa

    rows: Rows = []
    for file in files:
        found = read_file(file, config, None if read is None else read.used)
        if client_from_file:
            if found and "client" in found[0]:
                raise DataError(f"{file} has a column 'client' of its own: leave data.client_from_file off, or rename the column")
            for row in found:
                row["client"] = stem(file)
        rows += found
    if not rows:
        raise DataError(f"{files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''}: no rows in it")
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"
    arrays = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            unread = read is not None and name not in read.used
            arrays[name] = pa.nulls(len(rows)) if unread else pa.array([row.get(name) for row in rows])
        except UnicodeEncodeError as bad:  # JSON may spell half a surrogate pair, which is no text
            raise DataError(f"{where}: column '{name}' holds {bad.object[bad.start]!r}, which is no character: clean the file") from None
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as bad:
            if read is None or name in read.asked:
                reason = str(bad).splitlines()[0][:100]
                raise DataError(f"{where}: column '{name}' mixes types over its rows ({reason}): write all its values alike") from None
            arrays[name] = pa.nulls(len(rows))
    return datasets.Dataset(pa.table(arrays))


def read_file(file: Path, config: DataConfig, used: Collection[str] | None = None) -> Rows:
    """The rows of one file.

    Args:
        file: Its name.
        config: Format, encoding and pattern.
        used: The columns that are used: of a file that can be read by column, the others are None. None is all of them.

    Raises:
        DataError: Missing, empty, damaged, of an unknown format, or not in `data.encoding`.
    """
    kind = format_of(file, config)
    raw = read_bytes(file)
    if not raw:
        raise DataError(f"{file} is empty: wanted {kind} rows")
    if kind == "parquet":
        return read_parquet(raw, str(file), used)
    text = decode(raw, file, config.encoding, table=kind in TABLES)
    if kind in TABLES:
        return TABLES[kind](text, str(file), used)
    if kind == "text":
        return matches(text, compile_pattern(config.record_pattern), str(file)) if config.record_pattern else lines(text, str(file))
    return READERS[kind](text, str(file))


def format_of(file: Path, config: DataConfig) -> str:
    """What a file is read as: `data.format`, or what its name says.

    Raises:
        ConfigError: `data.record_pattern` does not go with it.
        DataError: Its name does not say.
    """
    kind = config.format
    if kind == "auto":
        kind = SUFFIXES.get(suffix(file), "text" if config.record_pattern else "")
        if not kind:
            raise DataError(
                f"{file}: its name does not tell its format: set data.format to one of {', '.join(dict.fromkeys(SUFFIXES.values()))}"
            )
    if config.record_pattern and kind != "text":
        raise ConfigError(f"data.record_pattern splits text, but {file} is {kind}: set data.format=text or leave the pattern out")
    return kind


def read_bytes(file: Path) -> bytes:
    try:
        raw = content_of(file)
        return gzip.decompress(raw) if file.name.lower().endswith(".gz") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as bad:
        raise DataError(f"{file} is not a whole gzip file ({bad}): fetch it again") from None
    except OSError as bad:
        raise DataError(f"cannot read {file}: {bad.strerror}") from None


def read_jsonl(text: str, where: str) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_object(_json(line, f"{where} line {number}", "one JSON object a line"), f"{where} line {number}"))
    return rows


def read_json(text: str, where: str) -> Rows:
    values = _json(text, where, "a JSON array of objects (for one object a line set data.format=jsonl)")
    if not isinstance(values, list):
        raise DataError(f"{where} holds a JSON {type(values).__name__}: wanted an array of objects")
    return [_object(value, f"{where} item {number}") for number, value in enumerate(values, 1)]


def _json(text: str, where: str, wanted: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as bad:
        at = f" at line {bad.lineno}, column {bad.colno}" if isinstance(bad, json.JSONDecodeError) and bad.lineno > 1 else ""
        reason = bad.msg if isinstance(bad, json.JSONDecodeError) else str(bad)
        raise DataError(f"{where} is not JSON{at} ({reason}): wanted {wanted}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where} is a JSON {type(value).__name__}: wanted an object such as {{"text": ...}}')
    return dict(value)


def read_parquet(raw: bytes, where: str, used: Collection[str] | None = None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(raw))
        names = file.schema_arrow.names
        rows = file.read([name for name in names if used is None or name in used]).to_pylist()
        return [{name: row.get(name) for name in names} for row in rows]
    except (pa.ArrowException, OSError) as bad:
        raise DataError(f"{where} is not a parquet file ({str(bad).splitlines()[0][:100]})") from None


TABLES = {"csv": read_csv, "tsv": read_tsv}
READERS: dict[str, Callable[[str, str], Rows]] = {"jsonl": read_jsonl, "json": read_json}

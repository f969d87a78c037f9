"""Checks of the data before any library is loaded: do the files exist, and do they have the required columns?

A check raises only errors that reading the rows would raise, in the same words. Other faults are found when the rows are read.
"""

import codecs
import dataclasses
import gzip
import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.contracts.task import task_of
from fedtune.data.columns import check_names, class_names, demo_columns, read_columns
from fedtune.data.decoding import decode, sniff
from fedtune.data.demo import generate
from fedtune.data.local import find_files, format_of, has_files, local_files, read_bytes
from fedtune.data.records import compile_pattern
from fedtune.data.tables import header
from fedtune.errors import ConfigError
from fedtune.storage.parsing import parse_json

_HEAD = 1 << 20  # bytes to search for a header line


def check_data(config: Config) -> None:
    """Check that local files, or the demo's columns, can satisfy the config.

    Raises:
        ConfigError: Settings contradict each other.
        DataError: A file or a column is missing.
    """
    if config.data.source == "demo":
        names = list(next(iter(generate(config.seed, homes=1, test_size=0)[0])))
        check_names(names, dataclasses.replace(config, data=demo_columns(config)), "training")
    if config.data.source != "local":
        return
    files, tests = local_files(config.data)
    if tests:
        _check_files(tests, config, "test")
    _check_files(files, config, "training")


def check_coordinator_data(config: Config) -> None:
    """`check_data` for a server, which neither needs nor partitions training rows.

    Raises:
        ConfigError: Settings contradict each other, or nothing names the classes.
        DataError: A file or a column is missing.
    """
    data = config.data
    if data.source == "local" and not has_files(data.path):
        if data.test_path:
            _check_files(find_files(data.test_path, "data.test_path", data), config, "test")
        elif task_of(config.task).classes and len(class_names(data)) < 2:
            raise no_classes()
        return
    check_data(unpartitioned(config))


def unpartitioned(config: Config) -> Config:
    """The config with partition.kind=iid, which needs no column; unchanged if the clients determine the test rows."""
    if config.partition.min_examples > 1:
        return config
    return dataclasses.replace(config, partition=dataclasses.replace(config.partition, kind="iid"))


def no_classes() -> ConfigError:
    return ConfigError(
        "this machine has neither training rows nor test rows that name the classes: set data.labels to the names in the order of their"
        " ids, or set data.test_path"
    )


def _check_files(files: list[Path], config: Config, what: str) -> None:
    required, present = read_columns(config).required, dict[str, None]()
    for file in files:
        if present and required <= present.keys():
            break
        names = _names(file, config, required - present.keys())
        if names is None:
            return
        present |= dict.fromkeys(names)
    if what == "training" and config.data.client_from_file:
        present["client"] = None
    check_names(present, config, what)


def _names(file: Path, config: Config, required: Collection[str]) -> list[str] | None:
    """The file's columns, for JSON only until the required ones are found; None if that needs a full read.

    Raises:
        ConfigError, DataError: The file cannot be read.
    """
    kind, data = format_of(file, config.data), config.data
    if kind == "text":
        return [*compile_pattern(data.record_pattern).groupindex] if data.record_pattern else ["text"]
    try:
        if kind in ("csv", "tsv"):
            return header(_beginning(file, data.encoding), kind, required) or None
        raw = read_bytes(file)
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_schema(io.BytesIO(raw)).names
        return _keys(decode(raw, file, data.encoding), kind, required)
    except (OSError, EOFError, ValueError, RecursionError):  # ArrowInvalid and the errors of JSON and Unicode are ValueErrors
        return None


def _beginning(file: Path, encoding: str) -> str:
    opened = gzip.open if file.name.lower().endswith(".gz") else open
    with opened(file, "rb") as f:
        raw: Any = f.read(_HEAD)
    if len(raw) == _HEAD:
        raw = raw[: raw.rfind(b"\n") + 1] or raw
    name = (sniff(raw, True) or "utf-8") if encoding == "auto" else encoding
    try:
        return codecs.getincrementaldecoder(name)().decode(raw).removeprefix("\ufeff")
    except LookupError:
        return decode(raw, file, encoding)  # raises the error of an unknown encoding


def _keys(text: str, kind: str, required: Collection[str]) -> list[str] | None:
    """The keys of the first objects that together have all required columns; of all objects if a column is missing."""
    absent = {name for name in required if json.dumps(name) not in text and json.dumps(name, ensure_ascii=False) not in text}
    if absent and "\\u" in text:  # the name may be written with escapes
        return None
    found = dict[str, None]()
    for value in _objects(text, kind):
        found |= dict.fromkeys(value)
        if {*required} - absent <= found.keys():
            break
    return [*found] or None


def _objects(text: str, kind: str) -> Iterator[dict[str, Any]]:
    if kind == "jsonl":
        yield from (parse_json(line) for line in text.split("\n") if line.strip())
        return
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        while text[at].isspace() or text[at] == ",":
            at += 1
        if text[at] == "]":
            return
        value, at = decoder.raw_decode(text, at)
        yield value

"""What can be said of the data before any library is loaded: are the files there, and do they have the columns that are asked for?

It refuses only what reading the rows would refuse, in the same words; what it cannot tell is left to the reader.
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

_HEAD = 1 << 20  # bytes, in which a header line is looked for


def check_data(config: Config) -> None:
    """Refuse local files, and columns of the demo, that cannot give what the config asks for.

    Raises:
        ConfigError: Settings that do not go together.
        DataError: A file or a column is missing.
    """
    if config.data.source == "demo":
        names = list(next(iter(generate(config.seed, homes=1, test_size=0)[0])))
        check_names(names, dataclasses.replace(config, data=demo_columns(config.data)), "training")
    if config.data.source != "local":
        return
    files, tests = local_files(config.data)
    if tests:
        _check_files(tests, config, "test")
    _check_files(files, config, "training")


def check_coordinator_data(config: Config) -> None:
    """As `check_data`, for a machine that needs no training rows and deals none.

    Raises:
        ConfigError: Settings that do not go together, or nothing that tells the classes.
        DataError: A file or a column is missing.
    """
    data = config.data
    if data.source == "local" and not has_files(data.path):
        if data.test_path:
            _check_files(find_files(data.test_path, "data.test_path", data), config, "test")
        elif task_of(config.task).classes and len(class_names(data)) < 2:
            raise no_classes()
        return
    check_data(undealt(config))


def undealt(config: Config) -> Config:
    """The config with a partition that asks nothing of the rows, where the clients do not decide which rows are the test."""
    if config.partition.min_examples > 1:
        return config
    return dataclasses.replace(config, partition=dataclasses.replace(config.partition, kind="iid"))


def no_classes() -> ConfigError:
    return ConfigError(
        "this machine has neither training rows nor a test that would tell the classes: set data.labels to their names in the order of"
        " their ids, or data.test_path"
    )


def _check_files(files: list[Path], config: Config, what: str) -> None:
    asked, present = read_columns(config).asked, dict[str, None]()
    for file in files:
        if asked <= present.keys():
            break
        names = _names(file, config, asked - present.keys())
        if names is None:
            return
        present |= dict.fromkeys(names)
    if what == "training" and config.data.client_from_file:
        present["client"] = None
    check_names(present, config, what)


def _names(file: Path, config: Config, asked: Collection[str]) -> list[str] | None:
    """The file's columns, of JSON as far as they are asked for; None where only reading all of it tells.

    Raises:
        ConfigError, DataError: The file cannot be read.
    """
    kind, data = format_of(file, config.data), config.data
    if kind == "text":
        return [*compile_pattern(data.record_pattern).groupindex] if data.record_pattern else ["text"]
    try:
        if kind in ("csv", "tsv"):
            return header(_beginning(file, data.encoding), kind, asked) or None
        raw = read_bytes(file)
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_schema(io.BytesIO(raw)).names
        return _keys(decode(raw, file, data.encoding), kind, asked)
    except (OSError, EOFError, ValueError, RecursionError):  # ArrowInvalid is a ValueError, JSON's and Unicode's errors too
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
        return decode(raw, file, encoding)  # which says that there is no such encoding


def _keys(text: str, kind: str, asked: Collection[str]) -> list[str] | None:
    """The keys of the first objects that together have all the columns asked for; of all objects, where none has one of them."""
    absent = {name for name in asked if json.dumps(name) not in text and json.dumps(name, ensure_ascii=False) not in text}
    if absent and "\\u" in text:  # it may be spelled by escapes
        return None
    found = dict[str, None]()
    for value in _objects(text, kind):
        found |= dict.fromkeys(value)
        if {*asked} - absent <= found.keys():
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

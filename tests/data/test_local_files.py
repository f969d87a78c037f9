"""Every local format gives the same rows, whichever way its files are named."""

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from fedtune.config import DataConfig
from fedtune.data.local import find_files, read_local
from fedtune.data.records import compile_pattern, matches
from fedtune.data.values import typed
from fedtune.errors import DataError

ROWS = [{"text": "one, two", "label": "x"}, {"text": 'say "hi"\tnow', "label": "y"}]
CONTENTS = {
    "rows.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "rows.json": json.dumps(ROWS, indent=1),
    "rows.csv": 'text,label\r\n"one, two",x\r\n"say ""hi""\tnow",y\r\n',
}


def read(path: Path | str, **settings: object) -> list[dict[str, object]]:
    rows, _ = read_local(DataConfig(source="local", path=str(path), **settings))  # type: ignore[arg-type]
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_formats_agree(tmp_path: Path, name: str, zipped: bool) -> None:
    raw = CONTENTS[name].encode()
    file = tmp_path / (name + ".gz" if zipped else name)
    file.write_bytes(gzip.compress(raw) if zipped else raw)
    assert read(file) == ROWS


@pytest.mark.parametrize("zipped", [False, True])
def test_parquet_files_have_the_same_rows(tmp_path: Path, zipped: bool) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    if zipped:
        (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress((tmp_path / "rows.parquet").read_bytes()))
    assert read(tmp_path / ("rows.parquet.gz" if zipped else "rows.parquet")) == ROWS


def test_tsv_keeps_quotes(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('text\tlabel\n"an open quote\tx\nanother "\ty\n')
    assert read(tmp_path / "rows.tsv") == [{"text": '"an open quote', "label": "x"}, {"text": 'another "', "label": "y"}]


def test_csv_fields_may_hold_line_breaks_and_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000  # beyond the csv module's own limit
    (tmp_path / "rows.csv").write_text(f'text\n"a\nb"\n{long}\n')
    assert read(tmp_path / "rows.csv") == [{"text": "a\nb"}, {"text": long}]


def test_text_has_one_record_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\r\n  \ntwo\u2028still two\n".encode())
    assert read(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two\u2028still two"}]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("\ufefftext\nä\n".encode())
    assert read(tmp_path / "rows.csv") == [{"text": "ä"}]


def test_the_encoding_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_bytes("café".encode("latin-1"))
    assert read(tmp_path / "rows.txt", encoding="latin-1") == [{"text": "café"}]


def test_columns_are_the_union_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "more": 1}\n')
    assert read(tmp_path / "a.jsonl") == [{"text": "a", "more": None}, {"text": "b", "more": 1}]


def test_a_file_name_gives_the_client(tmp_path: Path) -> None:
    for name in ("home_2.jsonl", "home_10.jsonl.gz"):
        raw = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert {(row["client"], row["text"]) for row in read(tmp_path, client_from_file=True)} == {
        ("home_2", "home_2.jsonl"),
        ("home_10", "home_10.jsonl.gz"),
    }


def test_folders_and_globs_exclude_a_test_file_among_the_training_files(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "test.json", ".hidden.json", "LICENSE"):
        (tmp_path / name).write_text(json.dumps([{"text": name}]))
    train, test = read_local(DataConfig(source="local", path=str(tmp_path), test_path=str(tmp_path / "test.json")))
    assert test is not None
    assert (train["text"][:], test["text"][:]) == (["a.json", "b.json"], ["test.json"])
    assert [file.name for file in find_files(str(tmp_path / "?.json"), "data.path", DataConfig())] == ["a.json", "b.json"]


def test_a_pattern_defines_columns_and_skipped_text_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    play = "Exeunt\n\nROMEO:\nO me!\nWhat fray?\n\nJULIET:\r\nAy me!\n"
    pattern = compile_pattern(r"(?s)^(?P<client>[A-Z]+):\n(?P<text>.+?)(?=\n\n|\n?\Z)")
    with caplog.at_level(logging.WARNING, "fedtune.data"):
        assert matches(play, pattern, "play.txt") == [
            {"client": "ROMEO", "text": "O me!\nWhat fray?"},
            {"client": "JULIET", "text": "Ay me!"},
        ]
    assert "play.txt: 6 of 48 characters belong to no record" in caplog.text  # "Exeunt"


def test_a_pattern_reads_files_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "TREC.train").write_text("NUM:dist How far ?\nHUM:desc Who ?\n")
    assert read(tmp_path / "TREC.train", record_pattern=r"^(?P<label>[A-Z]+):\S+ (?P<text>.+)$") == [
        {"label": "NUM", "text": "How far ?"},
        {"label": "HUM", "text": "Who ?"},
    ]


def test_empty_matches_are_not_records() -> None:
    assert matches("a\nb\n", compile_pattern("(?P<text>.*)"), "x") == [{"text": "a"}, {"text": "b"}]


def test_mixed_types_name_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="column 'text' has values of several types"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("values", [
    ["a", None, "é"], [1, None, -(2**63)], [1.5, float("inf")], [True, None], [None, None], [],
    [1, 2.5], [[1], []], [{"a": 1}, {"b": 2}], [b"x"],
], ids=str)  # fmt: skip
def test_a_column_has_the_values_that_arrow_reads(values: list[object]) -> None:
    array = pa.array(values)
    assert typed(values) == (array.to_pylist(), str(array.type))


@pytest.mark.parametrize("values", [["a", 1], [True, 1], [2**63], [2**64], ["\ud800"]], ids=repr)
def test_values_that_arrow_refuses_are_refused(values: list[object]) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)) as theirs:
        pa.array(values)
    with pytest.raises(theirs.type):
        typed(values)

"""csv and tsv files from spreadsheets and editors give the same rows."""

import dataclasses
import itertools
import json
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from fedtune.config import Config, DataConfig, from_dict
from fedtune.data import check_coordinator_data, check_data, load_federation
from fedtune.data.columns import read_columns
from fedtune.data.local import read_local
from fedtune.errors import DataError
from tests.quick import quick

ROOT = Path(__file__).parents[2]
ROWS = [("Größe; 1,5 | 2", "ja"), ('say "café"', "nein"), ("two\nlines", "ja"), ("“quoted” – €5", "nein")]
WANTED = [{"text": text, "label": label} for text, label in ROWS]


def quote(field: str) -> str:
    return '"' + field.replace('"', '""') + '"'


def table(delimiter: str, end: str, head: str = "text{}label", first: str = "") -> str:
    lines = [head.format(delimiter), *(f"{quote(text)}{delimiter}{label}" for text, label in ROWS)]
    return first + end.join([*lines, ""])


def read(file: Path, **settings: Any) -> list[dict[str, Any]]:
    rows, _ = read_local(DataConfig(source="local", path=str(file), **settings))
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_and_encoding_are_detected(tmp_path: Path, delimiter: str, encoding: str) -> None:
    for end, head, first in itertools.product(
        ("\n", "\r\n"), ("text{}label", " text {} label", "\u00a0text{}\"label \""), ("", f"sep={delimiter}\n")
    ):  # fmt: skip
        (tmp_path / "a.csv").write_bytes(table(delimiter, end, head, first).encode(encoding))
        assert read(tmp_path / "a.csv") == WANTED


def test_a_file_that_is_not_utf_8_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedtune.data"):
        (tmp_path / "a.csv").write_bytes(table(",", "\n").encode("utf-8"))
        read(tmp_path / "a.csv")
        assert not caplog.text
        (tmp_path / "a.csv").write_bytes(table(",", "\n").encode("cp1252"))
        read(tmp_path / "a.csv")
    assert "a.csv is not UTF-8 and is read as Windows-1252 ('Größe'): if that is wrong, set data.encoding" in caplog.text


def test_a_given_encoding_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text\nпривет\n".encode("cp1251"))
    assert read(tmp_path / "a.csv", encoding="cp1251") == [{"text": "привет"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('text, label\n"a, b", x\n', [{"text": "a, b", "label": "x"}]),  # blanks before quotes
        ("text,label\na,x\n,\n , \n\nb,y\n", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]),  # a spreadsheet's empty rows
        ("text,label,\na,x,\n", [{"text": "a", "label": "x", "": ""}]),
        ("text,label\n a,x\n", [{"text": " a", "label": "x"}]),  # blanks within a text stay
        ("text\na;b\nc;d\n", [{"text": "a;b"}, {"text": "c;d"}]),  # one column
        ("text;price, EUR\na;1,5\n", [{"text": "a", "price, EUR": "1,5"}]),
        ("text\tlabel\na, b\tx\n", [{"text": "a, b", "label": "x"}]),
    ],
)
def test_irregular_tables_are_read(tmp_path: Path, content: str, expected: list[dict[str, str]]) -> None:
    (tmp_path / "a.csv").write_text(content)
    config = DataConfig(source="local", path=str(tmp_path / "a.csv"))
    task = {"task": {"kind": "causal_lm"}, "partition": {"kind": "iid"}, "data": {"source": "local"}}
    used = read_columns(from_dict(task))
    rows, _ = read_local(config, used)
    assert [{k: v for k, v in row.items() if v is not None} for row in map(rows.__getitem__, range(len(rows)))] == [
        {k: v for k, v in row.items() if k in used.used} for row in expected
    ]
    if content.count("\n") > 1 and "price" not in content:  # also if it is not known which columns are used
        assert read(tmp_path / "a.csv") == expected


def test_an_unused_column_may_have_any_content(tmp_path: Path) -> None:
    config = {"task": {"kind": "causal_lm"}, "partition": {"kind": "iid", "clients": 1}, "data": {"source": "local", "test_fraction": 0.0}}
    (tmp_path / "a.csv").write_text("text,x,x,\na,1,2,3\nb,,zwei,\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": 1}\n{"text": "b", "x": [{}], "client": {"a": 1}}\n')
    never = pa.array([b"\xff", b"\xfe"])
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "x": never, "x.y": [{"z": 1}, None]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        run_config = from_dict({**config, "data": {**config["data"], "path": str(tmp_path / name)}})  # type: ignore[dict-item]
        check_data(run_config)
        assert load_federation(run_config).rows["text"][:] == ["a", "b"]


def test_parquet_reads_only_used_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    whole = pyarrow.parquet.ParquetFile.read
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", lambda self, columns: (seen.append(columns), whole(self, columns))[1])
    pyarrow.parquet.write_table(pa.table({"text": ["a"], "image": [b"\xff"]}), tmp_path / "a.parquet")
    config = from_dict({"task": {"kind": "causal_lm"}, "partition": {"kind": "iid"}, "data": {"source": "local", "path": str(tmp_path)}})
    read_local(config.data, read_columns(config))
    assert seen == [["text"]]


FILES = {
    "a.csv": b"text;label\na;x\nb;y\n",
    "b.csv": b"\xef\xbb\xbftext,label\na,x\n",
    "c.csv": "text,label\né,x\n".encode("cp1252"),
    "a.tsv": b"text\tlabel\na\tx\n",
    "a.jsonl": b'{"text": "a", "label": "x"}\n{"text": "intent", "label": "y"}\n',
    "a.json": b'[\n {"text": "a", "label": "x"},\n {"text": "intent", "label": "y"}\n]',
    "a.txt": b"one\ntwo\n",
    "a.parquet": b"",
}
WRONG: list[dict[str, str]] = [{"label": "intent"}, {"text": "{intent}", "label": "text"}, {"client": "intent", "label": "text"}]


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (file := tmp_path / request.param).write_bytes(FILES[request.param])
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table({"text": ["a"], "label": ["x"]}), file)
    return file


def classification(path: Path, **data: Any) -> Config:
    data = {"source": "local", "path": str(path), "test_fraction": 0.0, **data}
    return from_dict({"task": {"kind": "classification"}, "partition": {"kind": "iid", "clients": 1}, "data": data})


@pytest.mark.parametrize("columns", WRONG, ids=["a name", "a template", "a client"])
def test_a_wrong_column_is_refused_with_the_same_error_as_when_rows_are_read(file: Path, columns: dict[str, str]) -> None:
    config = classification(file, columns=columns)
    with pytest.raises(DataError, match="training rows have no column 'intent'|names 'intent', but the rows have only") as early:
        check_data(config)
    with pytest.raises(DataError) as late:
        load_federation(config)
    assert str(early.value) == str(late.value)
    check_data(classification(file, columns={"label": "text"}))


def test_a_wrong_column_of_the_test_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"text": "a", "intent": "x"}\n{"text": "b", "intent": "y"}\n')
    config = classification(tmp_path / "rows", format="jsonl", test_path=str(file), columns={"label": "intent"})
    if file.suffix != ".jsonl":
        config = classification(tmp_path / "rows.jsonl", test_path=str(file), columns={"label": "intent"})
        (tmp_path / "rows").rename(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="the test rows have no column 'intent'"):
        check_data(config)
    with pytest.raises(DataError, match="the test rows have no column 'intent'"):
        check_coordinator_data(dataclasses.replace(config, data=dataclasses.replace(config.data, path="")))


def test_the_check_does_not_report_faults_in_rows(tmp_path: Path) -> None:
    column = {"label": "größe"}
    for content in ('{"text": "a"}\n{"text": "b", "größe": 1}', '{"text": "a"}\n{"text": "b", "gr\\u00F6\\u00dfe": 1}', '{"text": '):
        for name, text in (("a.jsonl", content), ("a.json", f"[{content.replace(chr(10), ',')}]")):
            (tmp_path / name).write_text(text)
            check_data(classification(tmp_path / name, columns=column))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.csv").write_text("text\na\n")
    (tmp_path / "parts" / "b.csv").write_text("text,größe\na,1\n")
    check_data(classification(tmp_path / "parts", columns=column))
    (tmp_path / "parts" / "b.csv").write_bytes(b"\x81")
    check_data(classification(tmp_path / "parts", columns=column))


@pytest.mark.parametrize("program", ["sim", "cli.server"])
@pytest.mark.parametrize("name", quick(["a.csv", "a.jsonl", "a.json", "a.parquet"], "a.jsonl"))
def test_a_wrong_column_costs_less_than_a_second(tmp_path: Path, program: str, name: str) -> None:
    rows = [{"text": f"row {i} of many, with some words in it", "label": i % 7} for i in range(50_000)]
    if name == "a.csv":
        (tmp_path / name).write_text("text;label\n" + "".join(f"{row['text']};{row['label']}\n" for row in rows))
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        lines = ",\n".join(json.dumps(row) for row in rows)
        (tmp_path / name).write_text(f"[{lines}]" if name == "a.json" else lines.replace(",\n", "\n"))
    more = ["--insecure"] if program == "cli.server" else []
    settings = ["data=local", f"data.path={tmp_path / name}", "data.columns.label=intent", "task=classification", "partition=iid"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-m", f"fedtune.{program}", *settings, *more], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 2, process.stderr
    assert process.stderr.strip().endswith(
        "the training rows have no column 'intent' (data.columns.label), only text, label: correct the name"
    )
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_no_library_is_loaded_before_the_data_is_refused() -> None:
    heavy = ("torch", "datasets", "numpy", "pyarrow")
    code = f"import sys, fedtune.cli.server, fedtune.cli.simulate, fedtune.data.check; print(sys.modules.keys() & {heavy})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "set()\n"

"""Advice about rows: files are corrected and settings are changed as the error says."""

import gzip
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedtune.config import from_dict
from fedtune.data import load_federation
from tests.advised.rows import Place, error_of, follows
from tests.data.test_bad_input import CLS, LM, data, deal

Content = str | bytes
A, B = '{"text": "a", "label": "x"}\n', '{"text": "b", "label": "y"}\n'
ROWS = (A + B) * 6
BOTH = {"text": ["a", "b"] * 6, "label": ["x", "y"] * 6}


def refusal_of(place: Place, settings: dict[str, Any], files: dict[str, Content], path: str) -> str:
    """The error of reading these files, the only ones in their folder; "" if there is none."""
    folder = place.folder / str(len(list(place.folder.iterdir())))
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    values = settings | {"data": {"source": "local", "path": str(folder / path)} | settings.get("data", {})}
    if "test_path" in values["data"]:
        values["data"] = values["data"] | {"test_path": str(folder / values["data"]["test_path"])}
    return error_of(lambda: load_federation(from_dict(values)))


def rows(says: str, name: str, bad: Content, settings: dict[str, Any], *mends: Content | dict[str, Any]) -> None:
    """A row about a file and settings that are refused; each correction is another content of the file, or other settings."""

    def follow(place: Place) -> Iterator[str]:
        yield refusal_of(place, settings, {name: bad}, name)
        for mend in mends:
            if isinstance(mend, dict):
                yield refusal_of(place, mend, {name: bad}, name)
            else:
                yield refusal_of(place, settings, {name: mend}, name)

    follows(says)(follow)


def _parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(BOTH), out)
    return out.getvalue()


def _client(name: str | None) -> str:
    own = "" if name is None else f', "client": "{name}"'
    return "".join(f'{{"text": "{text}", "label": "{label}"{own}}}\n' for text, label in ("ax", "by") * 6)


# -- files --------------------------------------------------------------------------------------------------------------------------------

rows("{} is empty: give a file with {} rows", "a.jsonl", "", CLS, ROWS)
rows("{} is not JSON{} ({}): write {}", "a.jsonl", ROWS + '{"text": "b", ', CLS, ROWS)
rows("{} is a JSON {}: write an object such as", "a.jsonl", ROWS + "[1]", CLS, ROWS)
rows("{} is a JSON {}: write an array of objects", "a.json", "{}", CLS, "[" + ROWS.strip().replace("\n", ",") + "]")
rows("is not csv ({}): write a quote inside a quoted field twice", "a.csv", 'text,label\n"a "b",x\n"c,y\n', CLS,
     "text,label\n" + '"a ""b""",x\n"c",y\n' * 6)  # fmt: skip
rows("is not a parquet file ({}): copy it again, or set data.format", "a.parquet", b"PAR0" * 9, CLS, _parquet())
rows("is not a complete gzip file ({}): copy it again", "a.jsonl.gz", gzip.compress(ROWS.encode())[:-20], CLS, gzip.compress(ROWS.encode()))
rows("has an unknown suffix: set data.format to one of {}", "a.rows", ROWS, CLS, data(CLS, format="jsonl"))
rows("data.record_pattern splits text, but {} is {}: set data.format=text or remove the pattern", "a.csv", "text\nx\ny\nz\n",
     data(LM, record_pattern="(?P<text>.+)"), data(LM, record_pattern="(?P<text>.+)", format="text"), LM)  # fmt: skip
rows("has no named group: name the columns, such as (?P<text>...)", "a.txt", "x\ny\nz\n", data(LM, record_pattern="(.+)"),
     data(LM, record_pattern="(?P<text>.+)"))  # fmt: skip


def _files(says: str, settings: dict[str, Any], files: dict[str, Content], path: str, *mends: tuple[dict[str, Any], str]) -> None:
    def follow(place: Place) -> Iterator[str]:
        yield refusal_of(place, settings, files, path)
        for mend, where in mends:
            yield refusal_of(place, mend, files, where)

    follows(says)(follow)


_files("{}={} {}: give a file, a folder or a glob", CLS, {"a.jsonl": ROWS}, "b.jsonl", (CLS, "a.jsonl"), (CLS, ""), (CLS, "*.jsonl"))
TABLE = "text,label\n" + "a,x\nb,y\n" * 6
_files("{}={} has {} files: set data.format or give a glob such as *.{}", CLS, {"a.jsonl": ROWS, "b.csv": TABLE}, "",
       (data(CLS, format="jsonl"), ""), (CLS, "*.csv"))  # fmt: skip
_files("({}, or .gz of these): give another folder or set data.format", CLS, {"a.rows": ROWS}, "", (data(CLS, format="jsonl"), ""))
_files("has only test files (data.test_path={}): add a training file", data(CLS, test_path="a.jsonl"), {"a.jsonl": ROWS, "b.jsonl": ROWS},
       "a.jsonl", (data(CLS, test_path="a.jsonl"), ""))  # fmt: skip

# -- clients ------------------------------------------------------------------------------------------------------------------------------

EVERY = {"test_fraction": 0.0}
rows("{} has an empty client: give every row a client, or take partition.kind=iid", "a.jsonl", _client(" "), deal(CLS, kind="natural"),
     _client("c"), deal(CLS, kind="iid", clients=2))  # fmt: skip
rows("is more than the {} training rows: take fewer clients or more rows", "a.jsonl", ROWS, deal(CLS, kind="iid", clients=20),
     deal(CLS, kind="iid", clients=3), ROWS * 3)  # fmt: skip
rows("leaves no client, since the largest has {} rows: lower it", "a.jsonl", _client("c"), deal(CLS, kind="natural", min_examples=30),
     deal(CLS, kind="natural", min_examples=3))  # fmt: skip
rows("leaves the smallest of {} clients none of {} rows: lower it", "a.jsonl", ROWS, deal(CLS, kind="size", clients=4, alpha=9.0),
     deal(CLS, kind="size", clients=4, alpha=0.5))  # fmt: skip
rows("classes of the training rows: lower it", "a.jsonl", ROWS, deal(CLS, kind="pathological", clients=2, classes_per_client=3),
     deal(CLS, kind="pathological", clients=2, classes_per_client=2))  # fmt: skip
rows("the client id '{}' of {} {}: give it another, or take partition.kind=iid", "a.jsonl", _client("x" * 300), deal(CLS, kind="natural"),
     _client("x"), deal(CLS, kind="iid", clients=2))  # fmt: skip
rows("raise partition.clients or partition.classes_per_client", "a.csv", "text,label\n" + "".join(f"t,{i % 20}\n" for i in range(60)),
     data(deal(CLS, kind="pathological", clients=3, classes_per_client=4), **EVERY),
     data(deal(CLS, kind="pathological", clients=5, classes_per_client=4), **EVERY),
     data(deal(CLS, kind="pathological", clients=3, classes_per_client=7), **EVERY))  # fmt: skip
rows("but it has {} rows: take fewer clients or another partition.kind", "a.csv", "text,label\nt,0\n" + "t,1\n" * 5,
     data(deal(CLS, kind="pathological", clients=4, classes_per_client=1), **EVERY),
     data(deal(CLS, kind="pathological", clients=2, classes_per_client=1), **EVERY),
     data(deal(CLS, kind="iid", clients=4), **EVERY))  # fmt: skip
rows("{} already has a column 'client': set data.client_from_file=false, or rename the column", "a.jsonl", _client("c"),
     data(CLS, client_from_file=True), data(CLS, client_from_file=False), _client("c").replace("client", "owner"))  # fmt: skip
rows("has values of several types ({}): give all its values one type", "a.jsonl", '{"text": "a"}\n{"text": 1}\n' * 3, LM,
     '{"text": "a"}\n{"text": "1"}\n' * 3)  # fmt: skip
rows("{}: two columns are called '{}' in the header line: rename one", "a.csv", "text,text,label\n" + "a,c,x\nb,d,y\n" * 6, CLS,
     "text,title,label\n" + "a,c,x\nb,d,y\n" * 6)  # fmt: skip


@follows("data.client_from_file: {} and {} are both client '{}': rename one of them")
def _(place: Place) -> Iterator[str]:
    each, settings = gzip.compress(ROWS.encode()), data(deal(CLS, kind="natural"), client_from_file=True)
    for other in ("a.jsonl.gz", "b.jsonl.gz"):
        yield refusal_of(place, settings, {"a.jsonl": ROWS, other: each}, "")


@follows("data=local needs data.path: a file, a folder or a glob")
def _(place: Place) -> Iterator[str]:
    for i, path in enumerate(("", "a.jsonl", ".", "*.jsonl")):
        yield refusal_of(place, data(CLS, path=path and str(place.folder / str(i) / path)), {"a.jsonl": ROWS}, "")


@follows("test_size is {}, but {} homes have fewer distinct requests: lower it")
def _(place: Place) -> Iterator[str]:
    from fedtune.data import demo

    place.patch.setattr(
        demo, "_example", lambda draw, home: {"client": home.id, **dict.fromkeys(("request", "action"), str(draw.randrange(8)))}
    )
    for size in (9, 5):
        try:
            yield "" if demo.generate(0, homes=1, test_size=size) else "nothing"
        except ValueError as bad:
            yield str(bad)

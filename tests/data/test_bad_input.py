"""Bad input: cases and their error sentences."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import from_dict
from fedtune.data import Federation, check_data, load_federation
from fedtune.errors import ConfigError, DataError, FedtuneError

Q = '{"text": "a", "label": "x"}\n'
CLS: dict[str, Any] = {"task": {"kind": "classification"}, "partition": {"kind": "iid", "clients": 1}}
LM: dict[str, Any] = {"task": {"kind": "causal_lm"}, "partition": {"kind": "iid", "clients": 1}}
ASK: dict[str, Any] = {"task": {"kind": "instruction"}, "partition": {"kind": "iid", "clients": 1}}


def data(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    return base | {"data": values}


def deal(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    return base | {"partition": values}


CASES: dict[str, tuple[str, str | bytes | None, dict[str, Any], type[Exception], str]] = {
    # name: file name, its content, config, error class, sentence (a regular expression)
    "missing file": ("a.jsonl", None, CLS, DataError, r"data\.path=.*a\.jsonl does not exist: give a file, a folder or a glob$"),
    "glob without match": ("*.nothing", None, CLS, DataError, r"data\.path=.*nothing matches no file"),
    "empty file": ("a.jsonl", "", CLS, DataError, r"a\.jsonl is empty: give a file with jsonl rows$"),
    "only blank lines": ("a.jsonl", "\n\n", CLS, DataError, r"a\.jsonl: no rows$"),
    "header only": ("a.csv", "text,label\n", CLS, DataError, r"a\.csv: no rows$"),
    "broken json line": (
        "a.jsonl", Q + Q + '{"text": "b", ', CLS,
        DataError, r"a\.jsonl line 3 is not JSON \(.*\): write one JSON object a line$",
    ),
    "json line is a list": ("a.jsonl", Q + "[1]", CLS, DataError, r"a\.jsonl line 2 is a JSON list: write an object"),
    "broken json file": (
        "a.json", '[\n{"text": "a"},\n{]', CLS,
        DataError, r"a\.json is not JSON at line 3, column 2 .*data\.format=jsonl",
    ),
    "json object": ("a.json", "{}", CLS, DataError, r"a\.json is a JSON dict: write an array of objects$"),
    "deep json": ("a.jsonl", "[" * 200_000, CLS, DataError, r"a\.jsonl line 1 is not JSON \(nested too deeply\)"),
    "too few fields": (
        "a.csv", "text,label\na,x\nb\n", CLS, DataError, r"a\.csv line 3 has 1 fields, but the header has 2 \(text, label\)$",
    ),
    "too many fields": ("a.tsv", "text\tlabel\na\tx\ty\n", CLS, DataError, r"a\.tsv line 2 has 3 fields, but the header has 2"),
    "open quote": ("a.csv", 'text,label\n"a,x\n', CLS, DataError, r"a\.csv line 2 is not csv \(unexpected end of data\)"),
    "doubled column": ("a.csv", "text,text\na,b\n", LM, DataError, r"two columns are called 'text'"),
    "not parquet": ("a.parquet", b"PAR0" * 9, CLS, DataError, r"a\.parquet is not a parquet file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(Q.encode() * 99)[:-20], CLS, DataError, r"a\.jsonl\.gz is not a complete gzip file"),
    "not gzip": ("a.jsonl.gz", Q, CLS, DataError, r"a\.jsonl\.gz is not a complete gzip file"),
    "unknown format": (
        "a.xml", "<a/>", CLS,
        DataError, r"a\.xml has an unknown suffix: set data\.format to one of jsonl, json",
    ),
    "bad encoding": (
        "a.jsonl", Q.encode() + b'{"text": "caf\xe9"}', CLS, DataError,
        r"a\.jsonl: byte 0xe9 at offset 41 \(line 2\) is not utf-8: set data\.encoding to the .* such as data\.encoding=cp1252$",
    ),
    "unknown encoding": ("a.jsonl", Q, data(CLS, encoding="klingon"), ConfigError, r"data\.encoding=klingon is not known"),
    "bad pattern": (
        "a.txt", "x", data(LM, record_pattern="(?P<text>"),
        ConfigError, r"data\.record_pattern='.*' is not a regular expression",
    ),
    "pattern without names": ("a.txt", "x", data(LM, record_pattern="(.+)"), ConfigError, r"has no named group: name the columns"),
    "pattern without match": (
        "a.txt", "x", data(LM, record_pattern="^(?P<text>y)$"),
        DataError, r"a\.txt: .* has no match; the text starts with 'x'$",
    ),
    "pattern on csv": (
        "a.csv", "text\nx\n", data(LM, record_pattern="(?P<text>.)"),
        ConfigError, r"data\.record_pattern splits text, but .*a\.csv is csv",
    ),
    "missing column": (
        "a.jsonl", '{"post": "a"}', LM,
        DataError, r"task\.kind=causal_lm needs 'text', but the training rows have only post: set data\.columns\.text$",
    ),
    "mapped column missing": (
        "a.jsonl", Q, data(CLS, columns={"label": "intent"}), DataError,
        r"the training rows have no column 'intent' \(data\.columns\.label\), only text, label: correct the name$",
    ),
    "unknown column of ours": (
        "a.jsonl", Q, data(CLS, columns={"lable": "x"}),
        ConfigError, r"data\.columns\.lable is not known: choose from text, messages, label, prompt, answer, labels, chosen, .*, client",
    ),
    "no prompt": (
        "a.jsonl", Q, ASK,
        DataError, r"needs 'prompt', .* set data\.columns\.prompt or the templates data\.prompt and data\.answer$",
    ),
    "template field": (
        "a.jsonl", Q, data(ASK, prompt="{quesion}", answer="{label}"), DataError,
        r"the prompt template '\{quesion\}' names 'quesion', but the rows have only text, label: correct the name$",
    ),
    "template malformed": (
        "a.jsonl", Q, data(ASK, prompt="{text", answer="{label}"),
        ConfigError, r"the prompt template '\{text' is malformed",
    ),
    "template value missing": (
        "a.jsonl", Q + '{"text": null, "label": "y"}', data(ASK, prompt="{text}", answer="{label}"), DataError,
        r"the prompt template '\{text\}' needs 'text', but row 2 has none",
    ),
    "template part missing": (
        "a.jsonl", '{"a": []}', data(ASK, prompt="{a[0]}", answer="x"),
        DataError, r"cannot be filled from row 1 \(IndexError",
    ),
    "label missing in a row": (
        "a.jsonl", Q + '{"text": "b"}', CLS,
        DataError, r"training row 2 has no 'label': fill it or remove the row$",
    ),
    "label is a fraction": (
        "a.jsonl", '{"text": "a", "label": 0.5}', CLS,
        DataError, r"training row 1 has the label float 0\.5, but a label is a name",
    ),
    "text is a list": ("a.jsonl", '{"text": ["a"]}', LM, DataError, r"column 'text' has list values, but 'text' must be text"),
    "text is no number": (
        "a.jsonl", '{"text": NaN}', LM, DataError, r"row 1 of column 'text' is not a number \(nan\), but 'text' must be text",
    ),
    "a template takes no number": (
        "a.jsonl", '{"q": NaN, "a": "b"}', data(ASK, prompt="{q}", answer="{a}"),
        DataError, r"the prompt template '\{q\}' cannot be filled from row 1: 'q' is not a number \(nan\): fill it or remove the row$",
    ),
    "a template takes an empty part": (
        "a.jsonl", '{"q": {"x": null, "y": "z"}, "a": "b"}', data(ASK, prompt="{q[x]}", answer="{a}"),
        DataError, r"the prompt template '\{q\[x\]\}' cannot be filled from row 1: 'q\[x\]' is empty: fill it",
    ),
    "a template takes a method": (
        "a.jsonl", '{"q": "x", "a": "b"}', data(ASK, prompt="{q.upper}", answer="{a}"), DataError, r"'q\.upper' is a builtin_function",
    ),
    "bytes of no table": ("a.jsonl", b'{"text": "\x81"}', LM, DataError, r"such as data\.encoding=latin-1$"),
    "cp1252 read as utf-16": (
        "a.jsonl", b'{"text": "a\x93"}\n', data(LM, encoding="utf-16"), DataError, r"such as data\.encoding=cp1252$",
    ),
    "only blank texts": ("a.jsonl", '{"text": " "}', LM, DataError, r"every training row has an empty text"),
    "dirichlet without labels": (
        "a.txt", "x\ny", deal(LM, kind="dirichlet", clients=2),
        DataError, r"partition\.kind=dirichlet splits rows by label",
    ),
    "prior without labels": (
        "a.txt", "x\ny", deal(LM, kind="prior", clients=2),
        DataError, r"partition\.kind=prior splits rows by label, but these rows have none",
    ),
    "natural without clients": (
        "a.jsonl", Q, deal(CLS, kind="natural"),
        DataError, r"these rows name none: set data\.columns\.client or data\.client_from",
    ),
    "natural with a gap": (
        "a.jsonl", Q + '{"text": "b", "label": "x", "client": "c"}', deal(CLS, kind="natural"),
        DataError, r"row 1 has no 'client'",
    ),
    "natural with a blank": (
        "a.jsonl", '{"text": "b", "label": "x", "client": " "}', deal(CLS, kind="natural"),
        DataError, r"row 1 has an empty client",
    ),
    "clients all too small": (
        "a.jsonl", '{"text": "b", "label": "x", "client": "c"}', deal(CLS, kind="natural", min_examples=2), DataError,
        r"partition\.min_examples=2 leaves no client, since the largest has 1 rows: lower it$",
    ),
    "more clients than rows": (
        "a.jsonl", Q * 5, deal(CLS, kind="iid", clients=5),
        DataError, r"partition\.clients=5 is more than the 4 training rows",
    ),
    "too many classes a client": (
        "a.jsonl", Q * 5, deal(CLS, kind="pathological", clients=2, classes_per_client=2),
        DataError, r"classes_per_client=2 is more than the 1 classes",
    ),
    "too few hands for the classes": (
        "a.csv", "text,label\n" + "".join(f"t,{i}\n" for i in range(20)),
        data(deal(CLS, kind="pathological", clients=3, classes_per_client=4), test_fraction=0.0),
        DataError, r"3 clients of 4 classes have 12 of 20 classes",
    ),
    "more hands than rows of a class": (
        "a.csv", "text,label\nt,0\nt,1\nt,1\nt,1\nt,1\nt,1\n",
        data(deal(CLS, kind="pathological", clients=4, classes_per_client=1), test_fraction=0.0),
        DataError, r"pathological gives class 0 to 2 clients, but it has 1 rows: take fewer clients",
    ),
    "size too steep": (
        "a.jsonl", Q * 9, deal(CLS, kind="size", clients=4, alpha=9.0),
        DataError, r"partition\.alpha=9 leaves the smallest of 4 clients none",
    ),
    "one class": ("a.jsonl", Q * 9, CLS, DataError, r"training row has the label 'x', but classification needs at least two classes$"),
    "half a surrogate pair": ("a.jsonl", r'{"text": "\ud83d"}', LM, DataError, r"column 'text' has '\\ud83d', which is not a character"),
    "utf-16": ("a.jsonl", Q.encode("utf-16"), data(CLS, encoding="utf-8"), DataError, r"such as data\.encoding=utf-16$"),
    "cyrillic is not read as Windows-1252": (
        "a.csv", "text,label\nпривет,positive\n".encode("cp1251"), CLS, DataError, r"is not utf-8: .* such as data\.encoding=cp1251$",
    ),
    "chinese is not read as Windows-1252": (
        "a.csv", "text,label\n今天天气很好,positive\n".encode("gb18030"), CLS, DataError, r"is not utf-8: set data\.encoding",
    ),
    "a delimiter in a name": (
        "a.csv", "text;amount, EUR\na;1,5\n", CLS, DataError,
        r"needs 'label', but the training rows have only text, amount, EUR: set data\.columns\.label$",
    ),
    "a doubled column that blanks hide": ("a.csv", "text, text\na,b\n", LM, DataError, r"two columns are called 'text'"),
    "one row and a test": ("a.jsonl", Q, CLS, DataError, r"1 training row is too few for data\.test_fraction=0\.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_a_one_sentence_error(tmp_path: Path, case: str) -> None:
    name, content, settings, kind, sentence = CASES[case]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    config = from_dict(settings | {"data": {"source": "local", "path": str(file)} | settings.get("data", {})})
    with pytest.raises(kind, match=sentence) as caught:
        load_federation(config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 260
    try:  # the check without libraries gives the same sentence
        check_data(config)
    except FedtuneError as early:
        assert (type(early), str(early)) == (caught.type, str(caught.value)) or case == "broken json file"  # it also has no label


def load(path: Path, **settings: Any) -> Federation:
    return load_federation(from_dict(CLS | {"data": {"source": "local", "path": str(path)} | settings.pop("data", {})} | settings))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no data file \\(.jsonl"):
        load(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\na,x\n")
    (tmp_path / "b.jsonl").write_text(Q)
    with pytest.raises(DataError, match=r"has csv and jsonl files: set data.format or give a glob such as \*\.csv"):
        load(tmp_path)
    with pytest.raises(DataError, match="has only test files"):
        load(tmp_path / "a.csv", data={"test_path": str(tmp_path / "a.csv")})


def test_two_files_of_one_client_are_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.ndjson"):
        (tmp_path / name).write_text(Q)
    with pytest.raises(DataError, match="are both client 'a': rename one of them"):
        load(tmp_path, data={"client_from_file": True})


def test_a_client_column_beside_client_from_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x", "client": "b"}')
    with pytest.raises(DataError, match="already has a column 'client': set data.client_from_file=false"):
        load(tmp_path, data={"client_from_file": True})


def test_an_unknown_test_label_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(Q)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "t", "label": "new"}))
    with pytest.raises(DataError, match="test row 1 has the label 'new', but the classes are x: correct it or remove the row$"):
        load(tmp_path / "a.jsonl", data={"test_path": str(tmp_path / "t.jsonl")})


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        (["phone", "tablet"], "client 'c' has rows of device_class 'phone' and 'tablet': give all its rows one class"),
        (["tablet", "tablet"], "client 'c' has device_class 'tablet', but devices.classes has only phone"),
    ],
)
def test_bad_device_classes(tmp_path: Path, classes: list[str], sentence: str) -> None:
    rows = [{"text": "t", "label": i, "client": "c", "device_class": name} for i, name in enumerate(classes)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=sentence):
        load(tmp_path / "a.jsonl", partition={"kind": "natural"}, devices={"classes": {"phone": {}}}, data={"test_fraction": 0.0})


CHAT = [{"m": [{"role": "user", "content": f"why {i}?"}, {"role": "assistant", "content": "so"}], "label": "ab"[i % 2]} for i in range(4)]


@pytest.mark.parametrize(
    ("template", "key"),
    [("{m}", "prompt"), ("Q: {m[0]}", "prompt"), ("{m!s}", "prompt"), ("{m}", "answer"), ("m", "columns"), ("{m}", "columns")],
)
def test_a_hint_for_a_value_without_text_leads_to_text(tmp_path: Path, template: str, key: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, CHAT)))

    def settings(template: str) -> dict[str, Any]:
        if key == "columns":
            return data(CLS, columns={"text": template})
        return data(ASK, **({"prompt": "x", "answer": "y", "columns": {}} | {key: template}))

    with pytest.raises(DataError, match="name a part that is text") as refused:
        load(tmp_path / "a.jsonl", **settings(template))
    hint = re.findall(r"""such as '(?:data\.columns\.text=")?([^'"]+)"?'$""", str(refused.value))
    assert hint == ["{m[0][content]}"]
    rows = load(tmp_path / "a.jsonl", **settings(hint[0])).rows
    assert rows[{"columns": "text"}.get(key, key)][0].startswith("why ")

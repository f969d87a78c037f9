"""Input that breaks Python's parsers, and endless files: every command answers with one sentence, exit code 2 and no traceback."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fedtune.models
from fedtune.errors import FedtuneError
from fedtune.storage.parsing import content_of, parse_json, parse_yaml, read_text

DEEP, DIGITS = 100_000, 10_000
NANO = Path(str(fedtune.models.__file__)).parent / "nano"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP + "]" * DEEP, "nested too deeply"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
        ("9" * DIGITS, "a number has too many digits"),
        ("{", "Expecting property name"),
    ],
)
def test_invalid_json_is_a_value_error_with_a_short_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as bad:
        parse_json(text)
    assert len(str(bad.value)) < 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: " + "9" * DIGITS, "a number has too many digits"),
        ("a: [", "line 1: "),
        ("a: \x00", "unacceptable character"),
    ],
)
def test_invalid_yaml_is_a_value_error_with_a_short_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as bad:
        parse_yaml(text)
    assert len(str(bad.value)) < 200


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device"])
def test_pipes_devices_and_folders_are_not_read(tmp_path: Path, kind: str) -> None:
    path = no_file(tmp_path / "x", kind)
    for read in (content_of, read_text):
        with pytest.raises(OSError, match=r"not a file|a folder"):
            read(path)


def no_file(path: Path, kind: str) -> Path:
    """A pipe, device or folder in place of a file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    return Path("/dev/zero") if kind == "device" else path


# -- readers -------------------------------------------------------------------------------------------------------------------------------

JSON = {
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "digits": '{"round": ' + "9" * DIGITS + ', "num_hidden_layers": ' + "9" * DIGITS + "}",
}
YAML = {"deep": "a: " + "[" * 3000 + "]" * 3000, "digits": "rounds: " + "9" * DIGITS, "broken": "a: [", "list": "[]"}
PIPE = "a pipe"


def write(path: Path, text: str) -> None:
    if text == PIPE:
        os.mkfifo(path)
    else:
        path.write_text(text, encoding="utf-8")


def run_folder(folder: Path, name: str, text: str) -> Path:
    """A run directory without one of its files."""
    folder.mkdir()
    good = {"config.yaml": "rounds: 2\n", "metrics.jsonl": '{"round": 0, "client": null}\n'}
    for file, content in good.items():
        if file != name:
            write(folder / file, content)
    write(folder / name, text)
    return folder


def model_folder(folder: Path, name: str, text: str) -> Path:
    """The embedded backbone without one of its files."""
    shutil.copytree(NANO, folder)
    (folder / name).unlink(missing_ok=True)
    write(folder / name, text)
    return folder


def commands(args: list[str]) -> Callable[[], object]:
    from fedtune.cli.main import main

    return lambda: main(args)


def compose_call(args: list[str]) -> Callable[[], object]:
    from fedtune.config.compose import compose

    return lambda: compose(args)


READERS: dict[str, tuple[dict[str, str], Callable[[Path, str], Callable[[], object]]]] = {
    "status, config": (YAML | {PIPE: PIPE}, lambda p, t: commands(["status", str(run_folder(p / "r", "config.yaml", t))])),
    "compare, config": (YAML | {PIPE: PIPE}, lambda p, t: commands(["compare", str(run_folder(p / "r", "config.yaml", t))])),
    "resume": (YAML | {PIPE: PIPE}, lambda p, t: compose_call([f"resume={run_folder(p / 'r', 'config.yaml', t)}"])),
    "status, metrics": (JSON | {PIPE: PIPE}, lambda p, t: commands(["status", str(run_folder(p / "r", "metrics.jsonl", t + "\n{}\n"))])),
    "scenario": ({k: YAML[k] for k in ("deep", "broken", "digits")}, lambda p, t: compose_call([f"conf={scenario(p, t)}"])),
    "override": (
        {"deep": "[" * 3000 + "]" * 3000, "digits": "9" * DIGITS},
        lambda p, t: compose_call([f"peft.targets={t}", f"rounds={t}"]),
    ),
    "generate, config": (JSON | {PIPE: PIPE}, lambda p, t: commands(["generate", str(model_folder(p / "m", "config.json", t)), "x"])),
    "generate, tokenizer": (
        {"deep": JSON["deep list"], "odd": '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":["a"]}}', "int": '{"model": 3}'},
        lambda p, t: commands(["generate", str(model_folder(p / "m", "tokenizer.json", t)), "x"]),
    ),
    "rows": (JSON | {PIPE: PIPE}, lambda p, t: rows(p, "jsonl", t)),
    "rows, one array": (JSON, lambda p, t: rows(p, "json", t)),
    "device profile": (YAML | {PIPE: PIPE}, lambda p, t: profile(p, t)),
    "keys": (JSON | {PIPE: PIPE}, lambda p, t: allowed_file(p, t)),
}


def scenario(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    write(path, "defaults: [heterogeneous]\n" + text)
    return path


def rows(folder: Path, kind: str, text: str) -> Callable[[], object]:
    from fedtune.config import DataConfig
    from fedtune.data.local import read_file

    write(folder / f"rows.{kind}", text)
    return lambda: read_file(folder / f"rows.{kind}", DataConfig(source="local", path=str(folder / f"rows.{kind}")))


def profile(folder: Path, text: str) -> Callable[[], object]:
    from fedtune.clients.deployed import profile_of
    from fedtune.config import Config

    write(folder / "mine.yaml", text)
    return lambda: profile_of(str(folder / "mine.yaml"), Config())


def allowed_file(folder: Path, text: str) -> Callable[[], object]:
    from fedtune.network.keys import read_allowed

    write(folder / "allowed.json", text)
    return lambda: read_allowed(folder / "allowed.json")


@pytest.mark.parametrize(("reader", "case"), [(d, c) for d, (cases, _) in READERS.items() for c in cases])
def test_hostile_input_gives_a_one_sentence_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str, case: str) -> None:
    cases, make = READERS[reader]
    call = make(tmp_path, cases[case])
    try:
        code = call()
    except FedtuneError as bad:
        stderr = str(bad)
    else:
        assert code == 2
        stderr = capsys.readouterr().err.strip().removeprefix("fedtune: ")
    assert stderr and "\n" not in stderr and "Traceback" not in stderr and len(stderr) < 1000, stderr[:300]
    assert "set_int_max_str_digits" not in stderr


def test_all_commands_are_covered() -> None:
    assert sum(len(cases) for cases, _ in READERS.values()) > 30

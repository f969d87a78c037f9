"""`fedtune model`: what it prints, what it changes, and what it refuses."""

import json
import re
import time
from pathlib import Path

import pytest

from fedtune.cli.main import main
from fedtune.delivery.versions import Versions
from tests.delivery.test_versions import install

SCORES = {"old": 0.91, "global": 0.9, "personal": 0.9425}


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three versions, the second current; the newest one's date is impossible."""
    monkeypatch.setenv("COLUMNS", "80")
    for number, at in ((8, 1.79e9), (10, 1.8e9), (12, 1e300)):
        chosen = "personal" if number == 10 else "global"
        name = f"assistant-r{number:04}-1a2b3c4d"
        install(tmp_path, name, installed=at, round=number, chosen=chosen, metric="exact_match", scores=SCORES, bytes=123456789)
    Versions(tmp_path).activate("assistant-r0010-1a2b3c4d")
    return tmp_path


def model(state: Path, *words: str) -> int:
    return main(["model", *words, "--state", str(state)])


def test_a_list_fits_80_columns(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert model(state, "list") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = [re.split(r"  +", line.rstrip()) for line in out.splitlines()]
    assert rows == [
        ["version", "run", "round", "chosen"],
        ["", "assistant-r0012-1a2b3c4d", "assistant", "12", "global"],
        ["* assistant-r0010-1a2b3c4d", "assistant", "10", "personal"],
        ["", "assistant-r0008-1a2b3c4d", "assistant", "8", "global"],
        ["version", "score", "size", "installed"],
        ["", "assistant-r0012-1a2b3c4d", "exact_match 0.900", "123 MB", "–"],
        ["* assistant-r0010-1a2b3c4d", "exact_match 0.943", "123 MB", date(1.8e9)],
        ["", "assistant-r0008-1a2b3c4d", "exact_match 0.900", "123 MB", date(1.79e9)],
    ]


def test_a_record_cannot_write_to_the_terminal(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(state, "x", installed=0, run="\x1b[2J[red]", metric=None, scores={})
    assert model(state, "list") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[2J[red]" in out and "x" in out


def test_damage_is_reported_beside_the_table(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state / "models/versions/assistant-r0012-1a2b3c4d/record.json").write_text(json.dumps({"run": "a"}))
    assert model(state, "list") == 0
    out, err = capsys.readouterr()
    assert "  assistant-r0012-1a2b3c4d  –" in out and err.count("\n") == 1 and "is damaged (the record lacks the field 'round')" in err
    (state / "models/current").unlink()
    (state / "models/current").symlink_to("x")
    assert model(state, "list") == 2
    out, err = capsys.readouterr()
    assert "  assistant-r0010-1a2b3c4d" in out and "*" not in out
    assert err.splitlines()[1] == f"fedtune: {state}/models/current points to 'x', which is no version: remove this link"


def test_rollback_and_remove_change_the_current_version(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def out() -> str:
        return capsys.readouterr().out

    versions = Versions(state)
    assert model(state, "rollback") == 0 and out() == "assistant-r0008-1a2b3c4d is current\n"
    assert versions.current() == "assistant-r0008-1a2b3c4d"
    assert model(state, "remove", "assistant-r0012-1a2b3c4d") == 0 and out() == "removed assistant-r0012-1a2b3c4d\n"
    assert model(state, "remove", "--others") == 0 and out() == "removed assistant-r0010-1a2b3c4d\n"
    assert model(state, "remove", "--others") == 0 and out() == "there was nothing to remove\n"
    assert [version.name for version in versions.names()] == ["assistant-r0008-1a2b3c4d"] == [versions.current()]
    assert model(state, "remove", "--all") == 0 and out() == "removed assistant-r0008-1a2b3c4d\n" and versions.current() is None
    assert model(state, "list") == 0 and out() == "no model has been installed\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["remove", "../x"], "'../x' is not the name of a version"),
        (["remove", "assistant-r0010-1a2b3c4d"], "version assistant-r0010-1a2b3c4d is current: "),
        (["list", "--state", "/nothing"], "--state /nothing: no such folder; "),
    ],
)
def test_a_refusal_is_one_line(state: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", words[0], "--state", str(state), *words[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"fedtune: {why}") and err.count("\n") == 1
    assert len(Versions(state).names()) == 3


@pytest.mark.parametrize("words", [["remove"], ["remove", "a", "--all"], ["remove", "--others", "--all"], []])
def test_a_removal_needs_one_choice(state: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        model(state, *words)
    assert end.value.code == 2 and len(Versions(state).names()) == 3

"""Following an error's advice resolves it: each error is triggered as a user would, and its advice is followed as printed."""

import functools
import re
from pathlib import Path

import pytest

from tests.advice import HOLE, Sentence, advice
from tests.advised.rows import Place, Row, load_tables

PARTS = (
    "fedtune/network/keys.py",
    "fedtune/network/certificates.py",
    "fedtune/cli/",
    "fedtune/runs/status.py",
    "fedtune/runs/directory.py",
    "fedtune/config/stored.py",
    "fedtune/experiment.py",
    "fedtune/runs/report/compare.py",
    "fedtune/runs/report/html.py",
    "fedtune/runs/report/metrics.py",
    "fedtune/network/",
    "fedtune/export/",
    "fedtune/inference/",
    "fedtune/models/",
    "fedtune/storage/",
    "fedtune/templates/",
    "fedtune/rounds/",
    "fedtune/contracts/",
    "fedtune/traffic/",
    "fedtune/warm_start/",
    "fedtune/privacy/",
    "fedtune/delivery/",
    "fedtune/library.py",
    "fedtune/errors.py",
    *(f"fedtune/data/{name}.py" for name in ("check", "columns", "decoding", "federation", "hub", "local", "messages")),
    *(f"fedtune/data/{name}.py" for name in ("partition", "records", "tables", "values")),
    "clients/deployed.py",
    "clients/loaded_model.py",
    "clients/lower_layers.py",
    "clients/store.py",
    "clients/trainer.py",
    "clients/turns/",
)
NOT_FOLLOWED = {  # part of a sentence → why no test can do as it says
    "use the version that wrote it": "there is one version of fedtune here",
    "the SuperLink answers with HTTP {}; see its log and check its disk space": "a person looks at the log and at the disk",
    "the SuperLink did not store an object; see its log": "a person looks at the log and at the disk",
    "the SuperLink cannot start a run: see its log": "no input is known that brings it about; a person looks at the log",
    "no longer answers, because of an error in fedtune: the log has it; start the client again": "no input is known that brings it about",
    "its rendering process ended with status {}: see stderr": "a person reads what the process wrote there",
    "what the package discloses about them is not covered by ε": "it says what was read, and there is nothing to do",
    "must be a number: correct it or remove the row": "no task of fedtune has a column of numbers, only one of a test",
    "fill it or remove the row": "the end of other sentences, which are followed",
    "the divergence is {} at step {}: lower --lr": "no rate that is allowed makes a tiny model diverge",
}
ROWS = load_tables()


@functools.cache
def followed() -> list[Sentence]:
    return advice(PARTS)


def shown(sentence: Sentence) -> str:
    return sentence.text.replace(HOLE, "{}")


def texts_of(says: str) -> set[str]:
    """The sentences that a row is about: one, which may stand at several places."""
    found = {sentence.text for sentence in followed() if says in shown(sentence)}
    return {text for text in found if text == says} or found


def test_all_advice_is_followed() -> None:
    assert len(followed()) > 180
    known = set[str]().union(*(texts_of(says) for says in (*(row.says for row in ROWS), *NOT_FOLLOWED)))
    missing = [f"{s.where}: {shown(s)}" for s in followed() if s.text not in known]
    assert not missing, "\n".join(missing)


def test_each_row_is_about_one_sentence() -> None:
    assert not {says: found for says in (*(row.says for row in ROWS), *NOT_FOLLOWED) if len(found := texts_of(says)) != 1}
    assert len(NOT_FOLLOWED) < len(ROWS) / 10
    assert all(len(reason.split()) > 3 for reason in NOT_FOLLOWED.values())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: Path) -> Place:
    return Place(tmp_path, monkeypatch, capsys, kept)


@pytest.mark.parametrize("row", [pytest.param(r, marks=[pytest.mark.slow] if r.slow else [], id=r.says[:60]) for r in ROWS])
def test_following_the_advice_resolves_the_error(row: Row, place: Place) -> None:
    if row.library:
        pytest.importorskip(row.library)
    (text,) = texts_of(row.says)
    error, *then = row.follow(place)
    assert re.search(".*".join(map(re.escape, re.split(rf"{HOLE}|\{{\}}", text))), error, re.S), f"another sentence: {error}"
    assert then, "nothing was followed"
    assert then == [""] * len(then)

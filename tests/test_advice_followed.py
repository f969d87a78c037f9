"""Following an error's advice resolves it: each error is triggered as a user would, and its advice is followed as printed."""

import functools
import importlib
import re
from collections.abc import Set
from pathlib import Path

import pytest

from tests.advice import FOLDERS, HOLE, Sentence, advice
from tests.advised.rows import Place, Row, load_tables

PARTS = tuple(f"{folder}/" for folder in FOLDERS)
NO_ADVICE = {  # files whose sentences give no advice
    "fedtune/config/schema.py": "descriptions of settings, for --help",
    "fedtune/data/demo_grammar.py": "requests of the demo's homes",
    "fedtune/runs/report/style.py": "the report's style sheet",
    "simulations/benchmarks/inference/__main__.py": "the command that it repeats above its table",
    "simulations/benchmarks/inference/models.py": "a program of another engine",
    "simulations/benchmarks/precision.py": "the command that it repeats above its table",
    "simulations/studies/pretrain_nano.py": "the card of the embedded backbone",
}
NOT_FOLLOWED = {  # part of a sentence → why no test can do as it says
    "use the version that wrote it": "there is one version of fedtune here",
    "the SuperLink answers with HTTP {}; see its log and check its disk space": "a person looks at the log and at the disk",
    "the SuperLink did not store an object; see its log": "a person looks at the log and at the disk",
    "the SuperLink cannot start a run: see its log": "no input is known that brings it about; a person looks at the log",
    "no longer answers, because of an error in fedtune: the log has it; start the client again": "no input is known that brings it about",
    "its rendering process ended with status {}: see stderr": "a person reads what the process wrote there",
    "what the package discloses about them is not covered by ε": "it says what was read, and there is nothing to do",
    "must be a number of at most 1e18: correct it or remove the row": "no task of fedtune has a column of numbers, only one of a test",
    "fill it or remove the row": "the end of other sentences, which are followed",
    "the divergence is {} at step {}: lower --lr": "no rate that is allowed makes a tiny model diverge",
    "so put a TLS proxy in front of it": "a proxy is no part of fedtune",
    "accept its terms there and log in with `hf auth login`": "it needs an account of the hub",
    "Ray cannot be reached ({}): see `ray status`": "a person looks at the cluster",
    "{} did not start: see {}": "a person reads the logs of the benchmark's processes",
    "no answer from {} within {} s: see {}": "a person reads the logs of the benchmark's processes",
    "the server did not finish round {}: see {}": "a person reads the logs of the benchmark's processes",
    "an adaptive norm (quantile {}, start {})": "a part of a card that describes privacy",
    "clients share LoRA's A and keep its B": "the reason in a sentence that is followed",
}
OTHER_TESTS = {  # part of a sentence → the test that follows it
    "`fedtune export` writes the merged model:": "tests.runs.report.test_card.test_a_card_loads_the_trained_model",
    "the adapter cannot be merged into weights: load it with": "tests.runs.report.test_card.test_a_card_loads_the_trained_model",
}
ROWS = load_tables()
COVERED = [*(row.says for row in ROWS), *NOT_FOLLOWED, *OTHER_TESTS]


@functools.cache
def sentences_to_follow() -> list[Sentence]:
    return [s for s in advice(PARTS) if not s.where.startswith(tuple(NO_ADVICE))]


def as_in_tables(sentence: Sentence) -> str:
    return sentence.text.replace(HOLE, "{}")


def texts_of(says: str) -> Set[str]:
    """The sentences that contain this text: one, which may occur at several places."""
    found = {sentence.text: as_in_tables(sentence) for sentence in sentences_to_follow() if says in as_in_tables(sentence)}
    return {text for text, full in found.items() if full == says} or found.keys()


def test_all_advice_is_followed() -> None:
    assert len(sentences_to_follow()) > 600
    known = set[str]().union(*(texts_of(says) for says in COVERED))
    missing = [f"{s.where}: {as_in_tables(s)}" for s in sentences_to_follow() if s.text not in known]
    assert not missing, "\n".join(missing)


def test_each_row_is_about_one_sentence() -> None:
    assert all(hasattr(importlib.import_module(module), name) for module, _, name in (t.rpartition(".") for t in OTHER_TESTS.values()))
    assert not {says: found for says in COVERED if len(found := texts_of(says)) != 1}
    assert len(NOT_FOLLOWED) < len(ROWS) / 10
    assert all(len(reason.split()) > 3 for reason in NOT_FOLLOWED.values())


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared_folder: Path) -> Place:
    return Place(tmp_path, monkeypatch, capsys, shared_folder)


@pytest.mark.parametrize("row", [pytest.param(r, marks=[pytest.mark.slow] if r.slow else [], id=r.says[:60]) for r in ROWS])
def test_following_the_advice_resolves_the_error(row: Row, place: Place) -> None:
    if row.library:
        pytest.importorskip(row.library)
    (text,) = texts_of(row.says)
    error, *then = row.follow(place)
    assert re.search(".*".join(map(re.escape, re.split(rf"{HOLE}|\{{\}}", text))), error, re.S), f"another sentence: {error}"
    assert then, "nothing was followed"
    assert then == [""] * len(then)

"""The demo task: determinism, held-out test, skew; and the checkpoint that ships with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import fedtune.models
from fedtune.data import demo
from fedtune.data.demo_grammar import DEVICES, INTENTS, ROOMS, in_words, known

NANO = Path(fedtune.models.__path__[0]) / "nano"
BUDGET = 8 * 2**20  # bytes; the checkpoint is part of the repository


@cache
def task(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return demo.generate(seed)


def test_rows_are_the_same_in_another_process() -> None:
    # the package's __init__ imports torch, which takes too long for a quick test: an empty one replaces it
    program = (
        "import json, sys, types; from itertools import islice; package = types.ModuleType('fedtune.data');"
        f"package.__path__ = {[str(Path(demo.__file__).parent)]!r}; sys.modules['fedtune.data'] = package;"
        "import fedtune.data.demo as demo;"
        "print(json.dumps([*demo.generate(5, homes=3, test_size=9), list(islice(demo.pretraining_text(5), 4))]))"
    )
    # -R randomizes str hashes, so that a generator that depends on hash() or on set order fails
    process = subprocess.run([sys.executable, "-R", "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == [
        *demo.generate(5, homes=3, test_size=9),
        list(islice(demo.pretraining_text(5), 4)),
    ]


def test_different_seeds_give_different_rows() -> None:
    assert task(0)[1] != task(1)[1]


def test_home_seven_does_not_depend_on_the_number_of_homes() -> None:
    assert demo.homes(0, count=8)[7] == demo.homes(0, count=40)[7]


def test_no_home_trains_on_a_test_request() -> None:
    train, test = task(0)
    requests = [row["request"] for row in test]
    assert len(requests) == len(set(requests)) == 240
    assert not {row["request"] for row in train} & set(requests)


def test_a_request_means_one_action_in_every_home() -> None:
    meanings: dict[str, set[str]] = {}
    for row in [*task(0)[0], *task(0)[1], *task(1)[0], *task(1)[1]]:
        meanings.setdefault(row["request"], set()).add(row["action"])
    assert [request for request, actions in meanings.items() if len(actions) > 1] == []


def test_names_are_unique() -> None:
    names = [name for table in (ROOMS, DEVICES) for ways in table.values() for name in ways]
    assert len(names) == len(set(names))


def test_rows_have_the_documented_fields() -> None:
    people = {home.id: home for home in demo.homes(0)}
    for row in [*task(0)[0], *task(0)[1]]:
        assert row.keys() == {"client", "device_class", "request", "action", "intent", "parts", "rejected"}
        assert row["device_class"] == people[row["client"]].device_class
        assert row["intent"] in people[row["client"]].intents
        assert row["action"].split()[0] == INTENTS[row["intent"]].device
        assert 3 <= len(row["action"].split()) <= 6
        assert "{" not in row["request"] + row["action"]


def test_quantities_are_skewed() -> None:
    counts = Counter(row["client"] for row in task(0)[0])
    assert len(counts) == 24
    assert min(counts.values()) >= 40 and max(counts.values()) <= 160
    assert max(counts.values()) >= 3 * min(counts.values())
    assert counts == {home.id: home.examples for home in demo.homes(0)}


def test_labels_are_skewed() -> None:
    overall = Counter(row["intent"] for row in task(0)[0])
    apart: list[float] = []
    for home in demo.homes(0):
        mine = Counter(row["intent"] for row in task(0)[0] if row["client"] == home.id)
        # total variation distance between what this home asks for and what all ask for: 0 is the same, 1 is disjoint
        apart.append(sum(abs(mine[k] / mine.total() - overall[k] / overall.total()) for k in overall) / 2)
    assert sum(apart) / len(apart) > 0.5


def test_device_classes_have_their_configured_shares() -> None:
    # by construction of every ten homes: 4 phones, 3 single-board computers, 2 laptops, a workstation
    assert Counter(home.device_class for home in demo.homes(3, count=20)) == {
        "phone": 8,
        "single-board": 6,
        "laptop": 4,
        "workstation": 2,
    }


def test_the_test_set_is_drawn_evenly_from_all_homes() -> None:
    assert set(Counter(row["client"] for row in task(0)[1]).values()) == {240 // 24}


def test_too_large_a_test_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="test_size is 1000000"):
        demo.generate(0, homes=0, test_size=1_000_000)


def test_the_backbone_has_not_seen_the_task() -> None:
    text = "\n".join(islice(demo.pretraining_text(0), 1000)).lower()
    assert "request:" not in text and "action:" not in text
    actions = {row["action"] for seed in (0, 1) for rows in task(seed) for row in rows}
    assert len(actions) > 300
    assert [action for action in sorted(actions) if action in text] == []


def test_the_backbone_has_not_seen_the_held_out_names() -> None:
    text = "\n".join(islice(demo.pretraining_text(1), 500)).lower()
    corpus = f" {' '.join(re.findall(r'[a-z0-9]+', text))} "
    for table in (ROOMS, DEVICES):
        for ways in table.values():
            assert known(ways) == ways[:3]
            assert f" {ways[0]} " in corpus
            assert f" {ways[3]} " not in corpus
    assert not {"yo", "oi", "buddy"} & set(corpus.split())  # words of the slang style, which is held out completely


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (16, "sixteen"),
        (20, "twenty"),
        (21, "twenty one"),
        (100, "one hundred"),
        (220, "two hundred and twenty"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_the_checkpoint_is_small_and_complete() -> None:
    names = {file.name for file in NANO.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "PRETRAINING.md" in names
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= BUDGET


def test_the_tokenizer_round_trips() -> None:
    # the bare tokenizer, because importing transformers takes too long for a quick test
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    rows = task(0)[1]
    texts = [f"Request: {row['request']}\nAction: {row['action']}" for row in rows]
    texts += ["", "  two  spaces .", "né, 日本 🎉\r\n\t\x00"]
    assert [tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) for text in texts] == texts


def test_the_special_tokens_are_set_and_distinct() -> None:
    config = json.loads((NANO / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    ids = [tokenizer.token_to_id(config[f"{role}_token"]) for role in ("pad", "bos", "eos")]
    assert None not in ids and len(set(ids)) == 3
    model = json.loads((NANO / "config.json").read_text())
    assert [model[f"{role}_token_id"] for role in ("pad", "bos", "eos")] == ids
    assert model["vocab_size"] == tokenizer.get_vocab_size()

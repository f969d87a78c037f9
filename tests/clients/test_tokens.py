"""Encoded rows round-trip through a memory-mapped file."""

import numpy as np
import pytest

from fedtune.clients import tokens
from fedtune.clients.tokens import TokenStore
from fedtune.data import Example


def rows(count: int, seed: int) -> list[Example]:
    rng, out = np.random.default_rng(seed), []
    for k in range(count):
        ids = rng.integers(0, 1000, rng.integers(1, 40)).astype(np.int32)
        labels = ids if k % 3 == 0 else np.array([k], np.int32) if k % 3 == 1 else rng.integers(-100, 9, len(ids)).astype(np.int32)
        out.append(Example(ids, labels, k % 5, "" if k % 2 else f"größer {k} ✓"))
    return out


def same(a: Example, b: Example) -> bool:
    arrays = np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
    return arrays and (a.prompt_length, a.answer) == (b.prompt_length, b.answer)


def test_rows_are_unchanged_after_the_file_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_FIRST", 64)
    store = TokenStore()
    given = [rows(n, n) for n in (5, 1, 0, 30, 7)]
    kept = [store.add(g) for g in given]
    first = kept[0][0]
    kept.append(store.add(rows(400, 9)))
    assert same(first, given[0][0])  # a view of a map that has been replaced
    for group, back in zip([*given, rows(400, 9)], kept, strict=True):
        assert len(back) == len(group) and all(map(same, back, group))


def test_rows_are_a_sequence() -> None:
    given = rows(6, 1)
    back = TokenStore().add(given)
    assert same(back[-1], given[5]) and [len(e.input_ids) for e in back[1:5:2]] == [len(e.input_ids) for e in given[1:5:2]]
    with pytest.raises(IndexError, match="row 6 of 6"):
        back[6]


def test_rows_cannot_be_written_over() -> None:
    back = TokenStore().add(rows(1, 1))
    with pytest.raises(ValueError, match="read-only"):
        back[0].input_ids[0] = 1

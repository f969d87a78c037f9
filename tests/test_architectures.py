"""The table of docs/architectures.md matches the code."""

from pathlib import Path

import pytest

from tests.architectures import ROWS, measure, read_table, table, written


def test_the_page_has_a_row_for_each_architecture() -> None:
    found = read_table(written())
    assert list(found) == list(ROWS) and table(found) == written()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_page_matches_the_architecture(tmp_path: Path, name: str) -> None:
    assert measure(ROWS[name], tmp_path) == read_table(written())[name]

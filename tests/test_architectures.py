"""The table of docs/architectures.md matches the code."""

from pathlib import Path

import pytest

from tests.architectures import ROWS, generated_part, measure, read_table, table


def test_the_page_has_a_row_for_each_architecture() -> None:
    found = read_table(generated_part())
    assert list(found) == list(ROWS) and table(found) == generated_part()


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_page_matches_the_architecture(tmp_path: Path, name: str) -> None:
    assert measure(ROWS[name], tmp_path) == read_table(generated_part())[name]

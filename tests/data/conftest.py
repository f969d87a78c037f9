"""Real data for the tests of fedtune/data."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real data sets; they are not part of the repository."""
    folder = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip("no real data here: set FEDTUNE_DATA to its folder")
    return folder

"""With many clients no update is lost, and the server's memory does not grow with the rounds."""

from pathlib import Path

import pytest

from tests.faults.deployment import STORIES
from tests.faults.fifty import measure

CLIENTS, ROUNDS = 20, 5


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k and fed/tinyshakespeare")
def test_no_update_is_lost_and_memory_stays(tmp_path: Path) -> None:
    found = measure(tmp_path, CLIENTS, ROUNDS)
    assert found.counted == [CLIENTS] * ROUNDS
    for name, seen in found.memory.items():
        assert seen[-1] < seen[0] * 1.1 + 20, f"{name} grows: {seen}"  # MB; one round's updates of all clients are 20 × 0.1 MB

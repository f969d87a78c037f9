"""Some cells of the fault matrix; FEDTUNE_FAULTS=all runs them all (see matrix.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.deployment import ROOT, STORIES
from tests.faults.matrix import SHORT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs FEDTUNE_DATA with models/stories260k and fed/tinyshakespeare"),
]


def test_every_fault_ends_in_the_right_adapter(tmp_path: Path) -> None:
    only = [] if os.environ.get("FEDTUNE_FAULTS") == "all" else ["--only", *SHORT]
    # in a separate process, because it forks and kills
    command = [sys.executable, "-m", "tests.faults.matrix", "--fork", "--keep", str(tmp_path), *only]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(process.stdout)
    assert process.returncode == 0, process.stdout[-5000:]

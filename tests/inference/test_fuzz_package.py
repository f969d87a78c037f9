import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.fuzz_package import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_damaged_package_is_refused_in_one_sentence_or_runs(tmp_path: Path, seed: int) -> None:
    result = fuzz(30, seed, tmp_path)
    assert result.total() == 30 and result["refused"] > 10


@pytest.mark.slow
def test_two_thousand_damaged_packages_in_bounded_memory() -> None:
    command = [sys.executable, "-m", "tests.inference.fuzz_package", "2000", "7"]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    print(result)
    assert sum(result.values()) == 2000 and result["refused"] > 1000

"""The benchmark of a prefill's steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.inference.engine.native.library import kernels
from fedtune.simulations.benchmarks.inference.steps import STEPS


@pytest.mark.slow
def test_the_steps_and_the_rest_are_the_whole_pass(tmp_path: Path) -> None:
    if (found := kernels()) is None or found.instructions != "avx512":
        pytest.skip("needs AVX-512")
    arguments = ("--sizes", "tiny", "--kinds", "int4", "--rows", "8", "40", "--passes", "1", "--models", str(tmp_path))
    command = [sys.executable, "-m", "fedtune.simulations.benchmarks.inference.steps", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in ran.stdout.splitlines() if line.startswith("|")]
    assert rows[0] == ["tiny", "int4, 8 tokens", "int4, 40 tokens"] and [row[0] for row in rows[2:]] == [*STEPS, "all"]
    for column in (1, 2):
        cells = [row[column].split(", ") for row in rows[2:]]
        assert sum(float(cell[0]) for cell in cells[:-1]) == pytest.approx(float(cells[-1][0]), abs=0.05 * len(STEPS))
        compared = {row[0] for row, cell in zip(rows[2:], cells, strict=True) if len(cell) == 3}
        assert compared == {"qkv", "attention", "o", "gate and up", "down"}

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.fuzz_package import LIBRARY, build_sanitized, packages, sanitizer

ROOT = Path(__file__).parents[2]
FUZZ = [sys.executable, "-m", "tests.inference.fuzz_package"]

# a linear of 32 x 64 weights, one byte of which is missing
SHORT = """
import sys
from pathlib import Path
import numpy as np
from fedtune.inference.engine.linear import portable
from fedtune.inference.engine.make_linear import linear_from_tensors
from fedtune.inference.engine.native import build
sys.modules["torch"], build.LIBRARY = None, Path(sys.argv[1])
linear = linear_from_tensors("int4", portable("int4", np.ones((32, 64), np.float32)), n_in=64)
short = linear.parts["codes"].reshape(-1)[:-1].copy()
linear.weights.codes = short.ctypes.data
linear(np.ones((1, 64), np.float32))
"""


@pytest.mark.slow
def test_two_thousand_damaged_packages_in_bounded_memory() -> None:
    process = subprocess.run([*FUZZ, "2000", "7"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    print(result)
    assert sum(result.values()) == 2000 and result["refused"] > 1000


@pytest.mark.slow
@pytest.mark.skipif(sanitizer() is None, reason="gcc has no libasan here")
def test_damaged_packages_never_make_the_kernels_read_outside_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands: `python -m tests.inference.fuzz_package 10000 11 --sanitized`."""
    monkeypatch.setenv("CC", "gcc")
    packages(tmp_path)
    environment = build_sanitized(tmp_path / LIBRARY)
    command = [sys.executable, "-c", SHORT, str(tmp_path / LIBRARY)]
    noticed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert noticed.returncode != 0 and "ERROR: AddressSanitizer" in noticed.stderr
    command = [*FUZZ, "150", "3", "--sanitized", "--folder", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert sum(json.loads(process.stdout.splitlines()[-1]).values()) == 150

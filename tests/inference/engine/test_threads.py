"""The number of threads: as set, else as torch would choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedtune.inference.engine import threads as module
from fedtune.inference.engine.threads import set_threads, threads

TEXT = "import sys; from fedtune.inference.engine.threads import set_threads, threads; {}; assert 'torch' not in sys.modules"


def run_without_torch(code: str, **environment: str) -> str:
    """The output of a process without torch."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", TEXT.format(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=kept | environment, cwd=Path(__file__).parents[3]).stdout


def test_with_torch_the_number_of_torch_is_used_and_set() -> None:
    set_threads(3)  # the fixture of all tests sets it back
    assert threads() == torch.get_num_threads() == 3


def test_without_torch_the_environment_or_the_setting_is_used() -> None:
    assert run_without_torch("print(threads()); set_threads(5); print(threads())", OMP_NUM_THREADS="3,2").split() == ["3", "5"]
    for odd in ("", "0", "-1", "many"):
        assert 1 <= int(run_without_torch("print(threads())", OMP_NUM_THREADS=odd)) <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("siblings", "count"), [(("0,2", "1,3", "0,2", "1,3"), 2), (("0", "1", "2", "3"), 4), ((), 4)])
def test_threads_that_share_a_core_count_once(siblings: tuple[str, ...], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})

    def read(path: Path) -> str:
        found = [text for i, text in enumerate(siblings) if path.parts[-3] == f"cpu{i}"]
        if not found:
            raise FileNotFoundError
        return found[0]

    monkeypatch.setattr(module.Path, "read_text", read)
    assert module._default() == count


def test_torch_gets_the_number_that_was_set_before_it_was_loaded() -> None:
    code = (
        "set_threads(2); import fedtune.inference.engine.reference.passes, torch; print(torch.get_num_threads()); del sys.modules['torch']"
    )
    assert run_without_torch(code, OMP_NUM_THREADS="1").split() == ["2"]

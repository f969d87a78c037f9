"""One torch thread in every test: two are slower where anything else runs, and results must not depend on it."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from fedtune.rounds import membership

gc.disable()  # imported modules and collected tests stay to the end: scanning them again and again is a tenth of the suite's time


membership.POLL_S = 0.005  # simulated nodes answer at once; each run would wait ten times as long for its clients


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: network tests mostly wait."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

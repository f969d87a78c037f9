"""One torch thread in every test: two are slower where anything else runs, and results must not depend on it."""

import gc
from collections.abc import Iterator

import pytest
import torch

gc.disable()  # what is imported and collected stays to the end: to look through it again and again is a tenth of the suite's time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""One torch thread in every test: two are slower beside other processes, and results must not depend on the number."""

import functools
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

gc.disable()  # imported modules and collected tests stay to the end: scanning them again and again is a tenth of the suite's time
os.fsync = lambda _: None  # no test has a power failure, and thousands of flushes would wait for the disk; child processes do flush


def reuse_public_certificates() -> None:
    """Read the public certificates once: each HTTP client would read them again (20 ms), although most test servers have no TLS."""
    import httpx

    create = httpx.create_ssl_context

    @functools.cache
    def public(file: str | None, folder: str | None) -> Any:
        return create()

    def context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> Any:
        if verify is not True or cert is not None or not trust_env:
            return create(verify, cert, trust_env)
        return public(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    transports: Any = httpx._transports.default
    transports.create_ssl_context = context


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark cases as slow: of a test with more than four cases, every fourth and the last stay quick; with more than thirty, every eighth.

    `tests.quick` selects cases explicitly.
    """
    tests = dict[str, list[pytest.Item]]()
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        quick = [case for case in cases if not case.get_closest_marker("slow")]
        if len(quick) > 4 and not any(case.get_closest_marker("kind") for case in quick):
            step = 4 if len(quick) <= 30 else 8
            for number, case in enumerate(quick[:-1]):
                if number % step:
                    case.add_marker(pytest.mark.slow)


@functools.cache
def prepare() -> None:
    from fedtune.rounds import membership

    reuse_public_certificates()
    membership.POLL_S = 0.005  # simulated nodes answer at once; each run would wait ten times as long for its clients


def pytest_collectstart() -> None:
    """Import heavy modules only here: xdist's first process collects nothing, so it starts the others seconds earlier."""
    prepare()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # the default, 700, triggers a collection 16 times in a test, but few cycles hold much memory
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

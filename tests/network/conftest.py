"""Servers on the loopback interface, links to them, and nodes that stop at the end of their test."""

from collections.abc import Callable, Iterator

import pytest

from tests.network.loopback import Link, Server
from tests.network.running import Running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def run_id(server: Server) -> int:
    return server.open_run()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*args: object, **more: object) -> Running:
        started.append(Running(*args, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    link = Link(server.port)
    yield link
    link.close()

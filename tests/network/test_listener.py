"""Connections without a key are limited per address; connections with a verified key are not counted."""

import asyncio
import contextlib
import resource
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedtune.network.listener import MAX_UNAUTHENTICATED, Connections
from fedtune.network.public import PULL, PublicPort, StallTimeout
from fedtune.network.superlink import CONNECTIONS, FILES, _listen, _raise_file_limit
from tests.network.echo import new_key
from tests.network.test_public_port import MAX, Inside, sign_headers
from tests.network.waiting import wait_until

MOST, FEW = 12, 4
KEY = new_key()


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    """The address of a public port that accepts few connections."""
    connections = Connections(MOST, FEW)
    port = PublicPort(Inside(), max_body=MAX, keys={public_key_to_bytes(KEY.public_key())}, authenticated=connections.authenticate)
    server = uvicorn.Server(uvicorn.Config(port, http=StallTimeout, lifespan="off", log_config=None, timeout_keep_alive=60))
    with _listen("127.0.0.1", 0, connections) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield listening.getsockname()[:2]
        server.should_exit = True
        thread.join(5)


@contextlib.contextmanager
def connections(address: tuple[str, int], count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(count)]


def is_closed(guest: socket.socket) -> bool:
    """Whether the peer has closed the connection; an accepted connection stays silent."""
    guest.settimeout(0.3)
    try:
        return guest.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def await_place(address: tuple[str, int]) -> socket.socket:
    """Connect until the port accepts, which it does after it notices that another connection is closed."""
    tries: list[socket.socket] = []

    def is_accepted() -> bool:
        if tries:
            tries[-1].close()
        tries.append(socket.create_connection(address))
        return not is_closed(tries[-1])

    wait_until(is_accepted)
    return tries[-1]


def ask(client: httpx.Client, address: tuple[str, int]) -> int:
    return client.post(f"http://{address[0]}:{address[1]}{PULL}", headers=sign_headers(KEY)).status_code


@pytest.mark.slow
def test_connections_without_a_key_are_limited_per_address_and_clients_are_still_served(address: tuple[str, int]) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client()) for _ in range(FEW + 2)]  # more than may be open without a key
        assert [ask(client, address) for client in clients] == [200] * len(clients)
        with connections(address, FEW + 3) as flood:
            assert [is_closed(guest) for guest in flood] == [True] * 3 + [False] * FEW  # the oldest are closed
            assert [ask(client, address) for client in clients] == [200] * len(clients)  # on their open connections
            assert ask(stack.enter_context(httpx.Client()), address) == 200  # and on a new connection that sends its key at once
            assert [is_closed(guest) for guest in flood[3:]] == [True] + [False] * (FEW - 1)


def test_all_connections_together_have_a_limit(address: tuple[str, int]) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client()) for _ in range(MOST)]
        assert [ask(client, address) for client in clients] == [200] * MOST
        with connections(address, 1) as (one,):
            assert is_closed(one)
        clients.pop().close()
        one = await_place(address)
        assert ask(stack.enter_context(httpx.Client()), address) == 200  # connections with a key take precedence
        assert is_closed(one)
        one.close()


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (["192.0.2.1"] * 4, "192.0.2.2"),
        (["2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:1:ff::3", "2001:db8:0:1::4"], "2001:db8:0:2::1"),
    ],
)
def test_an_address_is_a_host_or_the_ipv6_prefix_of_one_household(same: list[str], other: str) -> None:
    connections, ended = Connections(MOST, FEW), list[int]()

    def admit(host: str, port: int) -> bool:
        return connections.admit((host, port), lambda: ended.append(port))

    assert all(admit(host, port) for port, host in enumerate(same)) and admit(other, 90) and ended == []
    assert admit(same[0], 91) and ended == [0]  # the oldest connection of the same host
    connections.authenticate((same[1], 1))
    connections.remove((same[2], 2))
    connections.remove((same[2], 2))  # a second removal has no effect
    assert admit(same[0], 92) and admit(same[0], 93) and ended == [0]
    assert admit(same[0], 94) and ended == [0, 3]


def test_a_flood_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    connections = Connections(MOST, FEW)
    for port in range(100):
        connections.admit(("192.0.2.1", port), lambda: None)
    (record,) = caplog.records
    assert (record.__dict__["peer"], record.getMessage()) == ("192.0.2.1", "refused")


def test_the_limit_of_open_files_covers_all_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        _raise_file_limit()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert allowed == (FILES if hard == resource.RLIM_INFINITY else min(FILES, hard))
    assert FILES > 2 * CONNECTIONS > 2 * MAX_UNAUTHENTICATED

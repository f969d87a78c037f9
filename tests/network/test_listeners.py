"""Socket options that connections inherit from both listening sockets."""

import socket
from collections.abc import Callable

import pytest

from fedtune.inference.serve import listener as served
from fedtune.network import superlink


@pytest.mark.parametrize(
    "listen", [lambda: served.listen("127.0.0.1", 0), lambda: superlink._listen("127.0.0.1", 0)], ids=["serve", "superlink"]
)
def test_a_connection_sends_small_answers_without_delay(listen: Callable[[], socket.socket]) -> None:
    with listen() as listener, socket.create_connection(listener.getsockname()[:2], timeout=5):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

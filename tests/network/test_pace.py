"""The more nodes, the less often each of them polls."""

import asyncio

import pytest

from fedtune.network.pace import PollPacer, read_pace
from fedtune.network.public import PublicPort
from tests.network.test_public_port import Inside


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nodes_wait_longer_if_there_are_more_of_them() -> None:
    clock = Clock()
    pace = PollPacer(clock)
    # 80 ms × (n − 5)
    assert [pace.interval(b"%d" % i) for i in range(50)][::7] == pytest.approx([0.1, 0.24, 0.8, 1.36, 1.92, 2.48, 3.04, 3.6])
    assert pace.interval(b"7") == pytest.approx(3.6)  # node 7 is already counted
    clock.now = 31.0
    assert pace.interval(b"7") == 0.1  # the other nodes are no longer counted
    many = PollPacer(clock)
    assert max(many.interval(b"%d" % i) for i in range(2000)) == 10.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.250", 0.25), ("", 0.0), ("soon", 0.0), ("nan", 0.0), ("-1", 0.0), ("inf", 0.0), ("1e9", 0.0)]
)
def test_a_node_ignores_an_invalid_interval(text: str, seconds: float) -> None:
    assert read_pace(text) == seconds


def test_every_answer_of_the_public_port_has_the_interval() -> None:
    headers: list[list[tuple[bytes, bytes]]] = []

    async def run() -> None:
        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(event: dict[str, object]) -> None:
            if event["type"] == "http.response.start":
                headers.append(event["headers"])  # type: ignore[arg-type]

        scope = {"type": "http", "method": "POST", "path": "/v1/fleet/pull-messages", "headers": []}
        await PublicPort(Inside(), max_body=100, keys=None)(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert headers and (b"x-fedtune-pace", b"0.100") in headers[0]

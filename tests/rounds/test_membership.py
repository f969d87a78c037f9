"""A client that the server rejects learns of it, once for each reason."""

import json
from collections.abc import Iterable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.cli.client import _news_reply
from fedtune.clients.declining import decline_on_error
from fedtune.contracts.hello import REJECTED
from fedtune.errors import DataError
from fedtune.network.turn_log import describe
from fedtune.rounds.membership import JoinPolicy, Membership
from fedtune.simulations.engines.grid import InProcessGrid
from tests.fakes import RecordingObserver


class Grid(InProcessGrid):
    """Records the sent messages."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(app, 2)
        self.sent: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        all_messages = list(messages)
        self.sent += all_messages
        return super().push_messages(all_messages)


def gather(network: bool) -> tuple[Grid, RecordingObserver, Membership]:
    """Node 1 has another backbone, node 2 declines by itself."""
    app = ClientApp()

    @app.query()
    @decline_on_error
    def hello(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            raise DataError("no rows")
        fields = {"client": "anna", "device_class": "", "examples": 3, "held_out": 0, "base": "c" * 64, "shifts": [], "remembers": True}
        return Message(RecordDict({"hello": ConfigRecord({"json": json.dumps(fields)})}), reply_to=message)

    grid, observer = Grid(app), RecordingObserver()
    policy = JoinPolicy(expected_clients=2 if network else None, patience_s=0.0, retry_s=0.0)
    members = Membership(grid, "b" * 64, 1, policy, observer, 100)
    for _ in range(4):
        members.refresh(1)
    return grid, observer, members


def test_a_rejected_client_is_notified_once_and_reports_it() -> None:
    grid, observer, _ = gather(network=True)
    (message,) = [m for m in grid.sent if m.metadata.message_type == REJECTED]
    why = "client anna has backbone cccccccccccc, but the run has bbbbbbbbbbbb"
    assert (message.metadata.dst_node_id, message.content["rejected"]["why"]) == (1, why)  # type: ignore[index]
    assert observer.notes.count(f"rejected: {why}") == 1
    reply = _news_reply(message)
    assert reply is not None
    assert describe(message, reply, 0.0) == (f"the server does not let this client take part: {why}", {"why": why})


def test_a_simulation_notifies_no_client() -> None:
    grid, observer, _ = gather(network=False)
    assert {m.metadata.message_type for m in grid.sent} == {"query"}
    assert len(observer.notes) == 2

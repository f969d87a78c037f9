"""Flower's Grid in one process: virtual nodes run the same ClientApp on the same messages, and nothing is serialised twice.

A reply is made when it is pulled, so that a cohort of any size needs the memory of one client: the backbone is shared, and the bridge folds
each update before it pulls the next.
"""

from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune import flower


class InProcessGrid(Grid):
    """`nodes` virtual clients behind Flower's Grid. Node i + 1 holds partition i.

    Messages are copied on their way in: clients pop from the records that they get.
    """

    def __init__(self, client_app: ClientApp, nodes: int) -> None:
        self._app = client_app
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            i + 1: Context(run_id=1, node_id=i + 1, node_config={"partition-id": i, "num-partitions": nodes}, state=RecordDict(), run_config={})
            for i in range(nodes)
        }
        self._waiting: dict[str, Message] = {}
        flower.identify_process(run_id=1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(flower.stamp(message))
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answer(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            reply = self._app(flower.copy_message(message), self._contexts[message.metadata.dst_node_id])
        except Exception as bad:  # one client's failure must not end the run, whatever it is
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"{type(bad).__name__}: {bad}"), reply_to=message)
        flower.stamp(reply)
        return reply

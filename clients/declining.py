"""Replies of clients that fail: one sentence in a `declined` record. An error on a device never ends the server's run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.errors import Decline, FedtuneError
from fedtune.models.memory import is_out_of_memory

Handler = Callable[[Message, Context], Message]
_OUT_OF_MEMORY = {  # kind of message → the sentence; the backbone is loaded for the first query
    "train": "out of memory: lower client.batch_size or task.max_length",
    "evaluate": "out of memory: lower eval.batch_size or task.max_length",
    "query": "out of memory: set model.precision=bf16, int8 or nf4, or take a smaller backbone",
}


@contextmanager
def client_named(client: str) -> Iterator[None]:
    """Attach the client's name to every error raised inside, for the decline reply. Before the hello, the server knows only a node id."""
    try:
        yield
    except Exception as bad:
        cast(Any, bad).client = client
        raise


def decline_on_error(handler: Handler) -> Handler:
    """Decorator: turn every exception of a handler into a decline reply."""

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as bad:  # the operator must see every failure of a device, and none may end the round
            return decline_reply(message, bad)

    return handle


def decline_reply(message: Message, bad: Exception) -> Message:
    """The reply of a client that failed with `bad`. It carries `bad.epsilon`, the spent ε, and `bad.client`, the name, if they are set."""
    if is_out_of_memory(bad):
        why = _OUT_OF_MEMORY[message.metadata.message_type.partition(".")[0]]
    else:
        why = str(bad) if isinstance(bad, FedtuneError) else f"{type(bad).__name__}: {bad}"
    kind = bad.kind if isinstance(bad, Decline) else "failed"
    fields: dict[str, str | float] = {"kind": kind, "why": why[:500]}
    if (client := getattr(bad, "client", None)) is not None:
        fields["client"] = str(client)
    if (spent := getattr(bad, "epsilon", None)) is not None:
        fields["epsilon"] = float(spent)
    return Message(RecordDict({"declined": ConfigRecord(cast(Any, fields))}), reply_to=message)

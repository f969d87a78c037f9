"""A client that fails replies with one sentence in a `declined` record: nothing that happens on a device ends the server's run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.errors import Decline, FedtuneError
from fedtune.models.memory import is_out_of_memory

Handler = Callable[[Message, Context], Message]


@contextmanager
def naming(client: str) -> Iterator[None]:
    """Give what is raised the client's name, which its decline then carries: a server knows a node by a number until it has said hello."""
    try:
        yield
    except Exception as bad:
        cast(Any, bad).client = client
        raise


def declining(handler: Handler) -> Handler:
    """Turn whatever goes wrong in a client into a reply that names it."""

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as bad:  # a device may break in any way; the cause must reach the operator, not end the round
            return declined(message, bad)

    return handle


def declined(message: Message, bad: Exception) -> Message:
    """The reply of a client that `bad` kept from its work; it carries what `bad` has of `epsilon`, what the client has spent so far, and of
    `client`, its name."""
    if is_out_of_memory(bad):
        why = "out of memory: lower client.batch_size or task.max_length"
    else:
        why = str(bad) if isinstance(bad, FedtuneError) else f"{type(bad).__name__}: {bad}"
    kind = bad.kind if isinstance(bad, Decline) else "failed"
    said: dict[str, str | float] = {"kind": kind, "why": why[:500]}
    if (client := getattr(bad, "client", None)) is not None:
        said["client"] = str(client)
    if (spent := getattr(bad, "epsilon", None)) is not None:
        said["epsilon"] = float(spent)
    return Message(RecordDict({"declined": ConfigRecord(cast(Any, said))}), reply_to=message)

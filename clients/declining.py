"""A client that fails replies with one sentence in a `declined` record: nothing that happens on a device ends the server's run."""

from collections.abc import Callable
from functools import wraps

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.errors import FedtuneError

Handler = Callable[[Message, Context], Message]
_MEMORY = "out of memory: lower client.batch_size or task.max_length"


def declining(handler: Handler) -> Handler:
    """Turn whatever goes wrong in a client into a reply that names it."""

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except FedtuneError as bad:
            return decline(message, "failed", str(bad))
        except (MemoryError, torch.OutOfMemoryError):
            return decline(message, "failed", _MEMORY)
        except Exception as bad:  # a device may break in any way; the cause must reach the operator, not end the round
            oom = isinstance(bad, RuntimeError) and "not enough memory" in str(bad)  # how torch's CPU allocator says it
            said = _MEMORY if oom else f"{type(bad).__name__}: {bad}"
            return decline(message, "failed", said)

    return handle


def decline(message: Message, kind: str, why: str) -> Message:
    """The reply of a client that does not take part: kind is `offline` or `failed`."""
    return Message(RecordDict({"declined": ConfigRecord({"kind": kind, "why": why[:500]})}), reply_to=message)

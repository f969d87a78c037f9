"""Outbox: builds a round's messages to its clients, counts their bytes, and marks messages over the traffic limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from flwr.app import ConfigRecord, RecordDict

from fedtune.config import Config
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.strategy import Assignment
from fedtune.contracts.wire import MessageWriter
from fedtune.errors import ConfigError
from fedtune.rounds.membership import SMALL_REPLY_BYTES
from fedtune.rounds.reply import expected_reply
from fedtune.traffic import blank_reply, broadcaster, with_codec

_TEXT_BYTES = 1000  # allowance for the update's JSON text in a reply, in addition to its tensors and their spec


@dataclass(frozen=True, kw_only=True)
class OutboundMessage:
    """One client's message.

    Args:
        assignment: The client's assignment, with the codec of the reply.
        content: The message's content.
        offer: Content of the offer that the client must accept first; None without an offer.
        nbytes: Network bytes of message and offer.
        start_bytes: Of these, the bytes of the start of a warm start; 0 if it is not in the message.
        over_limit: The reason why the message must not be sent; "" if it may be sent.
    """

    assignment: Assignment
    content: RecordDict
    offer: RecordDict | None
    nbytes: int
    over_limit: str
    start_bytes: int = 0


def write_messages(
    config: Config,
    round: int,
    assignments: Mapping[str, Assignment],
    held: Mapping[str, Sequence[int]],
    shifts: Sequence[AdapterState],
    first: AdapterState,
    snapshot: AdapterState | None = None,
    start: AdapterState | None = None,
    started: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, OutboundMessage]:
    """Build the messages of a round, in the order of logical ids.

    Args:
        config: The experiment.
        round: The round.
        assignments: Logical id → the strategy's assignment.
        held: Logical id → versions of the shifts that the client holds.
        shifts: Shifts merged into the frozen weights.
        first: The run's initial adapter.
        snapshot: Sums of the shifts, for the weights whose sum is smaller than its factors.
        start: The start of a warm start; None: clients draw the first adapter.
        started: Logical id → digest of the start that the client holds.
    """
    meter, limit = flower.Meter(), config.traffic.max_mb_per_round
    writer = MessageWriter(round, shifts, broadcaster(config.traffic, first, config.seed, round), snapshot, start)
    out = {}
    for client, given in sorted(with_codec(config.traffic, assignments).items()):
        content = writer.write(given.adapter, held=held[client], plan=given.plan, extra=given.extra, started=started.get(client, ""))
        offer = writer.offer(content, given.adapter, held[client])
        down = meter(content) + (meter(offer) if offer else 0)
        over_limit = "" if limit is None else describe_excess(limit, down, reply_bytes(given))
        out[client] = OutboundMessage(
            assignment=given, content=content, offer=offer, nbytes=down, over_limit=over_limit, start_bytes=meter(_start_of(content))
        )
    return out


def _start_of(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if name in ("start", "start-spec")})  # type: ignore[arg-type]


def check_affordable(messages: Mapping[str, OutboundMessage]) -> None:
    """Raises ConfigError if every message is over the traffic limit, because no client could participate in any round."""
    if messages and all(message.over_limit for message in messages.values()):
        smallest = min(messages.values(), key=lambda message: message.nbytes)
        raise ConfigError(f"no client could take part: {smallest.over_limit}")


def reply_bytes(assignment: Assignment) -> int:
    """Network bytes of the largest valid reply."""
    blank = blank_reply(assignment.plan.codec, expected_reply(assignment))
    text = ConfigRecord({"json": " " * _TEXT_BYTES, "spec": blank.spec.to_json()})
    return flower.Meter()(RecordDict({"adapter": blank.to_arrays(), "update": text}))


def max_reply_bytes(assignment: Assignment) -> int:
    """Maximum bytes of a reply to fetch: the largest valid reply plus an allowance for network framing."""
    return round(1.25 * reply_bytes(assignment)) + SMALL_REPLY_BYTES


def describe_excess(limit_mb: float | None, down: int, up: int) -> str:
    """The error for a turn of `down` and `up` bytes if it is over the limit; "" if it is not."""
    if limit_mb is None or down + up <= limit_mb * 1e6:
        return ""
    return (
        f"{down / 1e6:.3g} MB down and {up / 1e6:.3g} MB up exceed traffic.max_mb_per_round={limit_mb:g}: raise it, send less"
        " (traffic=int8, nf4 or topk), or train less (peft.rank, peft.targets)"
    )

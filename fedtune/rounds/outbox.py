"""A round's messages to its clients: encoded as the config asks, weighed, and held back where a turn would cost too much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from fedtune.config import Config
from fedtune.contracts import flower
from fedtune.contracts.adapter_state import AdapterState
from fedtune.contracts.strategy import Assignment
from fedtune.contracts.wire import Envelopes
from fedtune.errors import ConfigError
from fedtune.rounds.membership import FEW_BYTES
from fedtune.rounds.reply import wanted
from fedtune.traffic import blank_reply, broadcaster, with_codec

_WORDS = 1000  # bytes that a reply takes to say what it is, besides its tensors and their spec


@dataclass(frozen=True, kw_only=True)
class Letter:
    """One client's message.

    Args:
        assignment: What it asks, the reply's codec included.
        content: What travels.
        offer: What goes before it and is answered first; None where nothing does.
        nbytes: Bytes of both on the network.
        too_much: Why it must not be sent; "" where it may.
    """

    assignment: Assignment
    content: RecordDict
    offer: RecordDict | None
    nbytes: int
    too_much: str


def write_letters(
    config: Config,
    round: int,
    assignments: Mapping[str, Assignment],
    held: Mapping[str, Sequence[int]],
    shifts: Sequence[AdapterState],
    first: AdapterState,
    snapshot: AdapterState | None = None,
) -> dict[str, Letter]:
    """The messages of a round, in the order of logical ids.

    Args:
        config: The experiment.
        round: The round.
        assignments: Logical id → what the strategy asks of that client.
        held: Logical id → versions of the shifts that it has.
        shifts: What has been merged into the frozen weights.
        first: The run's first adapter.
        snapshot: The sum of the shifts, for the weights where that is smaller than their factors.
    """
    meter, limit = flower.Meter(), config.traffic.max_mb_per_round
    envelopes = Envelopes(round, shifts, broadcaster(config.traffic, first, config.seed, round), snapshot)
    out = {}
    for client, given in sorted(with_codec(config.traffic, assignments).items()):
        content = envelopes.write(given.adapter, held=held[client], plan=given.plan, extra=given.extra)
        offer = envelopes.offer(content, given.adapter, held[client])
        down = meter(content) + (meter(offer) if offer else 0)
        too_much = "" if limit is None else excess(limit, down, reply_bytes(given))
        out[client] = Letter(assignment=given, content=content, offer=offer, nbytes=down, too_much=too_much)
    return out


def check_affordable(letters: Mapping[str, Letter]) -> None:
    """Raises ConfigError where nobody could take part in the round of these letters, nor then in any."""
    if letters and all(letter.too_much for letter in letters.values()):
        cheapest = min(letters.values(), key=lambda letter: letter.nbytes)
        raise ConfigError(f"no client could take part: {cheapest.too_much}")


def reply_bytes(assignment: Assignment) -> int:
    """What the largest good reply takes on the network."""
    blank = blank_reply(assignment.plan.codec, wanted(assignment))
    said = ConfigRecord({"json": " " * _WORDS, "spec": blank.spec.to_json()})
    return flower.Meter()(RecordDict({"adapter": blank.to_arrays(), "update": said}))


def most_bytes(assignment: Assignment) -> int:
    """The largest reply that is worth fetching: a good one with room for how the network packs it."""
    return round(1.25 * reply_bytes(assignment)) + FEW_BYTES


def excess(limit_mb: float | None, down: int, up: int) -> str:
    """The sentence about a turn of so many bytes down and up, "" where it is within the limit."""
    if limit_mb is None or down + up <= limit_mb * 1e6:
        return ""
    return (
        f"{down / 1e6:.3g} MB down and {up / 1e6:.3g} MB up are more than traffic.max_mb_per_round={limit_mb:g}: raise it, send less"
        " (traffic=int8, nf4 or topk), or train less (peft.rank, peft.targets)"
    )

"""What server and client say to each other before the first round."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.config.bounds import require
from fedtune.errors import PlanError
from fedtune.storage.reading import read_object


@dataclass(frozen=True, kw_only=True)
class ServerHello:
    """What a server on a network says. An engine's server says only the round: its clients have the experiment already.

    Args:
        config: The experiment, as `config.to_dict` writes it.
        run: Name of the run, after which a client may name a folder.
        labels: Names of the classes, of a classification.
        round: The round that comes next.
    """

    config: Mapping[str, Any]
    run: str
    labels: tuple[str, ...]
    round: int = 0

    @classmethod
    def from_json(cls, text: str) -> "ServerHello":
        """Raises PlanError where `text` is no hello of this version of fedtune."""
        try:
            return read_object(cls, text, ValueError, "hello")
        except ValueError as bad:
            raise PlanError(f"the server's hello names no experiment ({bad}): the peers run different versions of fedtune") from None


@dataclass(frozen=True, kw_only=True)
class ClientHello:
    """What a client answers.

    Args:
        client: Its logical id.
        device_class: Its class; "" where there is none.
        examples: Rows that it trains on.
        held_out: Rows that it evaluates itself on.
        base: Fingerprint of its backbone.
        shifts: Versions of the shifts that its frozen weights carry.
        remembers: Whether they still will in its next turn.
        rank: LoRA rank that it asks for; None is the config's.
        device: How its device takes part, in words; "" where it is no real device.
    """

    client: str
    device_class: str
    examples: int
    held_out: int
    base: str
    shifts: tuple[int, ...]
    remembers: bool
    rank: int | None = None
    device: str = ""

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if name != "device" or value})

    @classmethod
    def from_json(cls, text: str) -> "ClientHello":
        """Raises ValueError where `text` is no hello, or a count is impossible."""
        hello = read_object(cls, text, ValueError, "hello")
        for name, least in (("examples", 0), ("held_out", 0), ("rank", 1)):
            require(f"the hello's {name}", getattr(hello, name), ValueError, ge=least)
        return hello
